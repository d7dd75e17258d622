"""Make a byte-pair vocabulary from texts, in the files that CLIPTokenizer and vpd/text.py read.

As in CLIP the vocabulary begins with the 256 bytes, inside and at the end of a word, so that any
text can be written; then come the merges, then the start and the end token (Sennrich et al. 2016).
"""
import json
from collections import Counter
from pathlib import Path

from vpd.text import BYTES, END, START, WORD_END, join_pair, pieces


def learn_merges(texts: list[str], limit: int) -> list[tuple[str, str]]:
    """The most frequent pair of neighbours, joined, again and again: at most `limit` times.

    Stops when every word is one token.  Equally frequent pairs go in alphabetical order.
    """
    counts = Counter(word for text in texts for word in pieces(text))
    words = {}
    for word in sorted(counts):
        parts = [BYTES[byte] for byte in word.encode("utf-8")]
        words[word] = [*parts[:-1], parts[-1] + WORD_END]
    merges = []
    while len(merges) < limit:
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: join_pair(parts, best) for word, parts in words.items()}
    return merges


def save_tokenizer(folder: Path, texts: list[str], limit: int, length: int) -> int:
    """Write the four files of a Hugging Face tokenizer; returns the size of its vocabulary.

    `length` is the number of tokens to which texts are cut or padded.
    """
    merges = learn_merges(texts, limit)
    tokens = [*BYTES.values(), *(c + WORD_END for c in BYTES.values())]
    tokens += dict.fromkeys("".join(pair) for pair in merges)     # two merges may end in one token
    tokens += [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length,
              "do_lower_case": True, "errors": "replace", **special}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (("vocab.json", {token: i for i, token in enumerate(tokens)}),
                          ("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(tokens)
