"""CLIP's text encoder and tokenizer, the third part of Stable Diffusion: words -> vectors.

The encoder must agree with CLIPTextModel of Hugging Face transformers and carries its parameter
names, the tokenizer with CLIPTokenizer (tests/test_text.py).  Radford et al. 2021, "Learning
Transferable Visual Models From Natural Language Supervision".  Facts that rewrites get wrong:
  * attention is causal and padding is not masked: states behind the end token depend on it;
  * GELU is x * sigmoid(1.702 x);
  * `pooled` is the state at the first end token; start, end and padding ids come from the
    vocabulary, since the ones in SD1.5's text_encoder/config.json belong to another;
  * the text is not cleaned up (ftfy): NFC, one space between words, lower case;
  * padding is the end token again, never 0, and its states are read like words' (VPD).

Both are read from a Stable Diffusion repository or folder (text_encoder/, tokenizer/), from CLIP's
own (openai/clip-vit-large-patch14), or from a single file in LDM naming, which lacks the tokenizer.
"""
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (EntryNotFoundError, HFValidationError, HfHubHTTPError,
                                    LocalEntryNotFoundError)
from torch import Tensor, nn

from ops.errors import InputError, read_json, read_object
from weights.files import SD15, assemble, check_config, dimension, local, read_tensors

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")  # in the order in which they are tried
WORD_END = "</w>"
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
LDM_PREFIX = "cond_stage_model.transformer."  # of a single file
HEAD = 64  # channels of a head, in every text encoder of CLIP's


@dataclass(frozen=True)
class TextConfig:
    """What a text encoder is; defaults: CLIP ViT-L/14, as in Stable Diffusion 1.x.

    The names are those of Hugging Face's config.json.
    """

    vocab_size: int = 49408
    hidden_size: int = 768  # D
    intermediate_size: int = 3072  # of the feed-forward layers
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77  # the longest text, in tokens


# ------------------------------------------------------------------------------------------------
# The encoder

class Embeddings(nn.Module):
    """A vector per token plus one per position."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class SelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        B, L, D = x.shape
        q, k, v = (proj(x).view(B, L, self.num_heads, -1).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D/heads)
        return self.out_proj(h.transpose(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    """Linear, quick GELU, linear."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class Layer(nn.Module):
    """Attention and feed-forward, each around a skip and behind a norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    """Embeddings, layers, norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            [Layer(config) for _ in range(config.num_hidden_layers)])})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        x = self.embeddings(ids)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class TextEncoder(nn.Module):
    """CLIP's text encoder; the end token must be the vocabulary's last one."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) -> the states of all tokens (B, L, D) and at the end token (B, D)."""
        if ids.shape[1] > self.config.max_position_embeddings:
            raise InputError(f"{ids.shape[1]} tokens: this text encoder reads at most "
                             f"{self.config.max_position_embeddings}")
        hidden = self.text_model(ids)
        return hidden, hidden[torch.arange(len(ids)), ids.argmax(dim=1)]

    @classmethod
    def from_pretrained(cls, source: str = SD15) -> "TextEncoder":
        """Load the text encoder of a source (see above); InputError if it is not usable."""
        tensors, values, path = read_encoder(source)
        tensors.pop("text_model.embeddings.position_ids", None)   # 0 1 2 ..., in older files
        return assemble(cls, text_sizes(tensors, values, path), tensors, path)


class TextReader:
    """Sentences -> the states of `length` tokens, by an encoder that is not trained.

    It is no part of a model and not in its checkpoints (official: refer/train.py).
    """

    def __init__(self, tokenizer: "Tokenizer", encoder: TextEncoder, length: int):
        longest = encoder.config.max_position_embeddings
        if not 3 <= length <= longest:
            raise InputError(f"{length} tokens per sentence: this text encoder reads 3 to "
                             f"{longest}")
        self.tokenizer, self.length = tokenizer, length
        self.encoder = encoder.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, source: str, length: int) -> "TextReader":
        """Tokenizer and encoder of a source; InputError if they are not usable."""
        return cls(Tokenizer.from_pretrained(source), TextEncoder.from_pretrained(source), length)

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Tensor:
        """(B, length, D) on the encoder's device; what is too long is cut."""
        ids = self.tokenizer(sentences, self.length)
        return self.encoder(ids.to(next(self.encoder.parameters()).device))[0]


# ------------------------------------------------------------------------------------------------
# Files

def read_encoder(source: str) -> tuple[dict[str, Tensor], dict, Path]:
    """(tensors by Hugging Face name, config.json as a dict, path read) of a source's text encoder.

    The config is empty for a single LDM file.
    """
    file = local(source)
    if file.is_file():
        return read_tensors(file, LDM_PREFIX), {}, file
    config, path = fetch(source, "text_encoder", ("config.json", "model.safetensors"))
    values = read_object(config)
    if isinstance(values.get("text_config"), dict):      # CLIP's own: text and images
        tensors = {f"text_model.{k}": v for k, v in read_tensors(path, "text_model.").items()}
        return tensors, values["text_config"], path
    tensors = read_tensors(path)
    if not any(name.startswith("text_model.") for name in tensors):   # as transformers 5 saves it
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors, values, path


def text_sizes(tensors: dict[str, Tensor], values: dict, path: Path) -> TextConfig:
    """The config of a text encoder's tensors; `values` is its config.json, which must say the same.
    """
    inner, first = "text_model.embeddings.", "text_model.encoder.layers.0.mlp.fc1.weight"
    width = dimension(tensors, f"{inner}token_embedding.weight", 1, path)
    sizes = {"vocab_size": dimension(tensors, f"{inner}token_embedding.weight", 0, path),
             "hidden_size": width, "intermediate_size": dimension(tensors, first, 0, path),
             "num_hidden_layers": sum(name.endswith(".mlp.fc1.weight") for name in tensors),
             "max_position_embeddings":
                 dimension(tensors, f"{inner}position_embedding.weight", 0, path)}
    check_config(values, sizes, path, "its tensors say")
    check_config(values, {"hidden_act": "quick_gelu"}, path, "Stable Diffusion 1.x has")
    heads = values.get("num_attention_heads") or max(1, width // HEAD)
    if type(heads) is not int or heads < 1 or width % heads:
        raise InputError(f"{path.parent / 'config.json'}: num_attention_heads is {heads}, which "
                         f"does not divide hidden_size {width}")
    return TextConfig(**sizes, num_attention_heads=heads)


def fetch(source: str, part: str, names: tuple[str, ...]) -> list[Path]:
    """Paths of files in `part`/ of a local folder or a hub id, or at its root if it is CLIP's own;
    InputError for the first lacking.
    """
    folder = local(source)
    if folder.is_dir():
        clip = (folder / "vocab.json").is_file() and not (folder / part).is_dir()
        place = folder if clip else folder / part
        for name in names:
            if not (place / name).is_file():
                raise InputError(f"{place / name} does not exist")
        return [place / name for name in names]
    try:
        try:
            return [Path(hf_hub_download(source, f"{part}/{name}")) for name in names]
        except EntryNotFoundError:
            return [Path(hf_hub_download(source, name)) for name in names]
    except HFValidationError:
        raise InputError(f"{source} is neither a local folder nor OWNER/NAME on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot download {part}/ of {source} ({reason})") from None


def tokenizer_files(source: str) -> list[Path]:
    """Paths of vocab.json, merges.txt, tokenizer_config.json.

    A single file has no tokenizer: one beside it is taken, else Stable Diffusion's from the hub.
    """
    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    file = local(source)
    if not file.is_file():
        return fetch(source, "tokenizer", names)
    if (file.parent / "tokenizer").is_dir():
        return fetch(str(file.parent), "tokenizer", names)
    try:
        return fetch(SD15, "tokenizer", names)
    except InputError as error:
        raise InputError(f"{file} holds no tokenizer: copy tokenizer/ of {SD15} into {file.parent} "
                         f"({error})") from None


# ------------------------------------------------------------------------------------------------
# The tokenizer

def byte_table() -> dict[int, str]:
    """A printable character for each byte, in the order of the vocabulary's first 256 entries."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | \
        {byte: chr(256 + i) for i, byte in enumerate(rest)}


BYTES = byte_table()


def pieces(text: str) -> list[str]:
    """Cut a text into words, single digits, runs of other signs, and English suffixes like 's."""
    text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    found, i = [], 0
    while i < len(text):
        suffix = next((s for s in SUFFIXES if text.startswith(s, i)), None)
        end = i + len(suffix) if suffix else i + 1
        if not suffix and kind(text[i]) in "LO":
            while end < len(text) and kind(text[end]) == kind(text[i]):
                end += 1
        if kind(text[i]) != " ":
            found.append(text[i:end])
        i = end
    return found


def kind(character: str) -> str:
    """"L" letter, "N" digit or other number, " " space, "O" anything else."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


class Tokenizer:
    """Byte-pair encoding: texts -> ids.  `vocabulary` maps tokens to ids, `merges` are ranked."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], length: int = 77):
        self.vocabulary, self.length = vocabulary, length
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = vocabulary[START], vocabulary[END]
        self.known = {START: [self.start], END: [self.end]}       # ids of words seen before

    def split(self, word: str) -> list[str]:
        """A word's tokens: its bytes, neighbours joined in the order of the merges' ranks."""
        parts = [BYTES[byte] for byte in word.encode("utf-8")]
        parts[-1] += WORD_END
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            parts = join_pair(parts, best)
        return parts

    def encode(self, text: str) -> list[int]:
        """Ids of a text without start, end and padding; a start or end token that is spelt out in
        it is one, as in transformers.
        """
        ids = []
        for part in SPECIAL.split(text):
            for word in [part] if part in (START, END) else pieces(part):
                if word not in self.known:
                    self.known[word] = [self.vocabulary[part] for part in self.split(word)]
                ids += self.known[word]
        return ids

    def __call__(self, texts: list[str], length: int | None = None) -> Tensor:
        """Texts -> ids (B, length): start, text, end; cut or padded with the end token's id."""
        length = length or self.length
        rows = [[self.start, *self.encode(text)[:length - 2], self.end] for text in texts]
        return torch.tensor([row + [self.end] * (length - len(row)) for row in rows])

    @classmethod
    def from_pretrained(cls, source: str = SD15) -> "Tokenizer":
        """Load the tokenizer of a source (see above); InputError if it is not usable."""
        vocabulary, merges, config = tokenizer_files(source)
        lines = merges.read_text(encoding="utf-8").split("\n")[1:]   # the first one is a header
        table = read_json(vocabulary)
        for token in (START, END):
            if token not in table:
                raise InputError(f"{vocabulary} has no {token}")
        return cls(table, [tuple(line.split()) for line in lines if line.strip()],
                   read_json(config).get("model_max_length", 77))


def join_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join all occurrences of a pair of neighbours, from left to right."""
    joined, i = [], 0
    while i < len(parts):
        hit = tuple(parts[i:i + 2]) == pair
        joined.append("".join(pair) if hit else parts[i])
        i += 2 if hit else 1
    return joined
