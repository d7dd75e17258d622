"""Text encoder and tokenizer are CLIP's: they equal transformers', under its names.

    pytest tests/test_text.py
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from oracles import randomise
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ops.errors import InputError
from pretraining.bpe import save_tokenizer
from vpd.text import (BYTES, END, START, TextConfig, TextEncoder, TextReader, Tokenizer, fetch,
                      pieces)

TINY = TextConfig(vocab_size=600, hidden_size=48, intermediate_size=100, num_hidden_layers=3,
                  num_attention_heads=4, max_position_embeddings=20)
TEXTS = ["a photo of a ball", "", "  Two\n balls\tand  a CONE ", "it's 1234 o'clock, isn't it?!",
         "'single quotes'", "schön naïve café ÉCOLE İstanbul", "漢字とカナ", "हिन्दी ภาษาไทย", "x" * 50,
         "3½ cups² №5", "wow!!! ... (really)?", "🙂👩‍🚀 done", "e\u0301 combining",
         "we'll they've I'M", "tab\u00a0nbsp\u3000wide", "a_b-c/d\\e",
         "ﬁne “quotes” don’t", "\u200bzero\u200dwidth"]


@pytest.fixture(scope="module")
def pair():
    """(transformers' CLIPTextModel, our encoder) with the same random weights."""
    oracle = randomise(CLIPTextModel(CLIPTextConfig(
        **vars(TINY), hidden_act="quick_gelu", eos_token_id=599, bos_token_id=598)))
    ours = TextEncoder(TINY).eval()
    ours.load_state_dict(with_prefix(oracle))
    return oracle, ours


def with_prefix(oracle):
    """The oracle's tensors under the names that files have; transformers 5 drops the prefix."""
    return {"text_model." + name.removeprefix("text_model."): tensor
            for name, tensor in oracle.state_dict().items() if "position_ids" not in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small tokenizer/, learnt from a few words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder / "tokenizer", TEXTS[:8] + ["two balls and a cone"] * 5, 60, 20)
    return folder


def test_names_are_hugging_faces():
    """196 tensors and 123,060,480 parameters at the width of Stable Diffusion 1.5."""
    with torch.device("meta"):
        full = TextEncoder()
    assert len(full.state_dict()) == 196
    assert sum(p.numel() for p in full.parameters()) == 123_060_480
    assert "text_model.encoder.layers.11.self_attn.q_proj.weight" in full.state_dict()


@pytest.mark.parametrize("length", [20, 7])
def test_equals_transformers(pair, length):
    """States and pooled states equal CLIPTextModel's (float32, 1e-5), for any length."""
    oracle, ours = pair
    ids = torch.randint(0, 598, (4, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 598
    for row, end in enumerate((length - 1, 3, 1, 5)):
        ids[row, end:] = 599
    with torch.no_grad():
        expected = oracle(ids)
        hidden, pooled = ours(ids)
    assert (hidden - expected.last_hidden_state).abs().max() < 1e-5
    assert (pooled - expected.pooler_output).abs().max() < 1e-5


def test_words_do_not_see_what_follows(pair):
    """Causal: the states up to the first end token don't depend on the padding."""
    ids = torch.tensor([[598, 5, 6, 599, 599, 599], [598, 5, 6, 599, 7, 8]])
    with torch.no_grad():
        hidden, pooled = pair[1](ids)
    assert torch.equal(hidden[0, :4], hidden[1, :4]) and torch.equal(pooled[0], pooled[1])
    assert not torch.equal(hidden[0, 4:], hidden[1, 4:])


def test_folder_is_loaded_strictly(pair, tmp_path):
    """from_pretrained reads a folder, ignores position_ids only, and names what is wrong."""
    part = tmp_path / "text_encoder"
    part.mkdir()
    config = {**vars(TINY), "hidden_act": "quick_gelu", "eos_token_id": 2}
    (part / "config.json").write_text(json.dumps(config))
    tensors = {k: v.clone() for k, v in with_prefix(pair[0]).items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    save_file(tensors | positions, part / "model.safetensors")
    ours = TextEncoder.from_pretrained(str(tmp_path))
    assert all(torch.equal(v, pair[1].state_dict()[k]) for k, v in ours.state_dict().items())
    save_file(tensors | {"text_projection.weight": torch.zeros(2)}, part / "model.safetensors")
    with pytest.raises(InputError, match="unknown tensor text_projection.weight"):
        TextEncoder.from_pretrained(str(tmp_path))
    (part / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(InputError, match="hidden_act is gelu"):
        TextEncoder.from_pretrained(str(tmp_path))
    (part / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors does not exist"):
        TextEncoder.from_pretrained(str(tmp_path))


def test_clips_own_repository_is_read(pair, folder, tmp_path):
    """CLIP's folder: text_config, text_model.* beside an image encoder, the tokenizer at the root.
    """
    config = {"text_config": {**vars(TINY), "hidden_act": "quick_gelu"}, "projection_dim": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    others = {"vision_model.x": torch.zeros(2), "text_projection.weight": torch.zeros(2),
              "logit_scale": torch.zeros(1)}
    save_file(with_prefix(pair[0]) | others, tmp_path / "model.safetensors")
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, tmp_path)
    reader = TextReader.from_pretrained(str(tmp_path), 12)
    assert reader.encoder.config == TINY
    assert all(torch.equal(v, pair[1].state_dict()[k])
               for k, v in reader.encoder.state_dict().items())
    assert reader.tokenizer.vocabulary == Tokenizer.from_pretrained(str(folder)).vocabulary


def test_single_file_is_read(folder, tmp_path, monkeypatch):
    """An LDM file's text encoder, widths off its tensors, and the tokenizer/ beside it; without one
    the message says whose belongs there.
    """
    config = replace(TINY, hidden_size=64, num_attention_heads=1)     # 64 channels per head
    ours = randomise(TextEncoder(config))
    file = tmp_path / "v1-5.safetensors"
    tensors = {f"cond_stage_model.transformer.{k}": v for k, v in ours.state_dict().items()}
    save_file(tensors | {"model.diffusion_model.x": torch.zeros(2)}, file)
    read = TextEncoder.from_pretrained(str(file))
    assert read.config == config and all(torch.equal(v, ours.state_dict()[k])
                                         for k, v in read.state_dict().items())
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    assert Tokenizer.from_pretrained(str(file))(["a"]).shape == (1, 20)
    shutil.rmtree(tmp_path / "tokenizer")

    def offline(repo, name):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("vpd.text.hf_hub_download", offline)
    with pytest.raises(InputError, match="holds no tokenizer: copy tokenizer/ of stable-diffusion"):
        Tokenizer.from_pretrained(str(file))


def test_hub_repositories_of_both_kinds_are_found(tmp_path, monkeypatch):
    """On the hub, too, part/NAME is looked for first, then NAME, as in CLIP's repository."""
    asked = []

    def download(repo, name):
        asked.append(name)
        if "/" in name:
            raise EntryNotFoundError("404")
        return tmp_path / name

    monkeypatch.setattr("vpd.text.hf_hub_download", download)
    found = fetch("openai/clip", "text_encoder", ("config.json", "model.safetensors"))
    assert found == [tmp_path / "config.json", tmp_path / "model.safetensors"]
    assert asked[:2] == ["text_encoder/config.json", "config.json"]


def test_reader_gives_the_states_of_all_tokens(pair, folder):
    """Padding included, cut to its length, without gradient; an impossible length is refused."""
    tokenizer = Tokenizer.from_pretrained(str(folder))
    small = TextEncoder(replace(TINY, vocab_size=len(tokenizer.vocabulary)))
    reader = TextReader(tokenizer, small, 12)
    states = reader(["a ball", "x " * 500])
    assert states.shape == (2, 12, 48) and not states.requires_grad
    assert torch.equal(states[0], small(tokenizer(["a ball"], 12))[0][0])
    with pytest.raises(InputError, match="40 tokens per sentence: .* reads 3 to 20"):
        TextReader(tokenizer, small, 40)


def test_config_must_fit_the_tensors(pair, tmp_path):
    """A config.json that says another width than the tensors is refused by its key."""
    part = tmp_path / "text_encoder"
    part.mkdir()
    save_file(with_prefix(pair[0]), part / "model.safetensors")
    for key, value in (("hidden_size", 64), ("num_attention_heads", 5)):
        (part / "config.json").write_text(json.dumps({**vars(TINY), key: value}))
        with pytest.raises(InputError, match=f"{key} is {value}"):
            TextEncoder.from_pretrained(str(tmp_path))


def test_too_long_a_text_is_refused(pair):
    """More tokens than positions: one line says how many there may be."""
    with pytest.raises(InputError, match="21 tokens.* at most 20"):
        pair[1](torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize("length", [20, 77, 6])
def test_tokenizer_equals_transformers(folder, length):
    """Ids of all sorts of texts equal CLIPTokenizer's, cut and padded."""
    ours = Tokenizer.from_pretrained(str(folder))
    oracle = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    expected = oracle(TEXTS, padding="max_length", max_length=length, truncation=True,
                      return_tensors="pt").input_ids
    assert torch.equal(ours(TEXTS, length), expected)


def test_default_length_is_the_files(folder):
    """model_max_length of tokenizer_config.json is the length unless another is given."""
    assert Tokenizer.from_pretrained(str(folder))(["a", "b"]).shape == (2, 20)


def test_tokens_are_clips():
    """94 texts, Hindi and emoji among them, get the ids that CLIP's own vocabulary gives them, and
    are padded and cut as VPD's loader does.
    """
    golden = json.loads((Path(__file__).parent / "golden" / "clip_tokens.json").read_text())
    bytes_ = [*BYTES.values(), *(c + "</w>" for c in BYTES.values())]
    vocabulary = {token: i for i, token in enumerate(bytes_)} | golden["vocabulary"]
    ours = Tokenizer(vocabulary, [tuple(pair.split(" ")) for pair in golden["merges"]])
    for text, ids in golden["rows"]:
        assert [ours.start, *ours.encode(text), ours.end] == ids, text
    for text, ids in golden["padded"]:
        assert ours([text], len(ids))[0].tolist() == ids, text


def test_special_tokens_in_a_text_are_special(folder):
    """A start or end token that is spelt out in a text is one, as in CLIPTokenizer."""
    ours = Tokenizer.from_pretrained(str(folder))
    oracle = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for text in (f"a {END} b", START * 2, f"!!{END}", END.upper(), f"don{END}'t", END[:-1]):
        assert [ours.start, *ours.encode(text), ours.end] == oracle(text).input_ids, text


def test_pieces():
    """Words, single digits, other signs, suffixes."""
    assert pieces("It's 42 --  ok!") == ["it", "'s", "4", "2", "--", "ok", "!"]


def test_incomplete_tokenizer_is_refused(folder, tmp_path):
    """A lacking file or end token is named."""
    with pytest.raises(InputError, match="vocab.json does not exist"):
        Tokenizer.from_pretrained(str(tmp_path))
    part = tmp_path / "tokenizer"
    part.mkdir()
    for name, text in (("vocab.json", "{}"), ("merges.txt", "#version: 0.2\n"),
                       ("tokenizer_config.json", "{}")):
        (part / name).write_text(text)
    with pytest.raises(InputError, match="has no <|startoftext|>"):
        Tokenizer.from_pretrained(str(tmp_path))
