"""The campaign's corrupted runs and weights: each kind makes its good files, then draws cases.

A case is a function (random generator, Box) -> verdict, see `judge`.  It calls the real loaders.
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import shutil
import types
import typing
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from helpers import recipe
from ldm_names import to_ldm
from official_fixture import official_file
from safetensors.torch import load_file, save, save_file

import train
from model import Config, MetaPromptModel, read_config
from ops.errors import InputError
from tasks.recipes import read_recipe
from unet import UNet, UNetConfig
from vae import VAEConfig, VAEEncoder
from weights import checkpoint
from weights.runs import Log, read_log


class Box(NamedTuple):
    """What a kind's cases work with: a folder of their own, and the good things in it."""

    folder: Path
    good: dict


def judge(load, verdict, what: str = "") -> tuple[str, str]:
    """(what became of a case, note): "clean", or what `verdict` says of an accepted result.

    Any other exception is the caller's to see: "failed".
    """
    try:
        result = load()
    except (InputError, FloatingPointError) as error:
        return ("clean" if str(error).isprintable() else "failed"), str(error)
    except SystemExit as stop:                           # of run_command
        return ("clean" if stop.code in (1, 2) else "failed"), f"exit {stop.code}"
    return verdict(result), what


def put(path: Path, raw: bytes) -> Path:
    """A new file (the old one may still be mapped)."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    return path


# ------------------------------------------------------------------------------------------------
# Corruption

def corrupt(raw: bytes, rng) -> bytes:
    """Bits flipped; bytes overwritten, cut off, inserted, removed, zeroed; often near the start."""
    data, action = bytearray(raw), rng.integers(7)
    span = max(1, min(len(raw), int(rng.choice([64, 2048, len(raw) or 1]))))
    place, length = int(rng.integers(span)), int(rng.integers(1, 64))
    if action == 0:
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(span))] ^= 1 << int(rng.integers(8))
    elif action == 1:
        data[place:place + length] = rng.bytes(length)
    elif action == 2:
        del data[int(rng.integers(len(raw) or 1)):]
    elif action == 3:
        data[place:place] = rng.bytes(length)
    elif action == 4:
        del data[place:place + length]
    elif action == 5:
        data[place:place + length] = bytes(length)
    else:
        data[place:place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\x80", b"9999", b"-1  "])
    return bytes(data)


NESTED = [[]]
ABSURD = [None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e30, 1e308, math.nan, math.inf,
          -math.inf, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 30, "", "x", "0", "nan", "true", "\0",
          "\x1b[31mred", "a\nb", "../../x", "\u00e9" * 300, [], [1], [0] * 4, [1] * 4, [64] * 4,
          NESTED, ["a"], [math.nan], [-1, -1], {}, {"a": 1}, "@DEEP@", "@HUGE@"]


def places(value, path=()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


def mutate(value, rng) -> tuple[str, str, str]:
    """(JSON text, what was changed, how) of a value changed at one place, or of torn text."""
    value, action = copy.deepcopy(value), str(rng.choice(["other"] * 8 + ["gone", "extra", "text"]))
    if action == "text":
        text = corrupt(json.dumps(value).encode(), rng).decode("latin-1")
        return str(rng.choice([text, "", "null", "[]", "3", '"x"', "{}"])), text[:50], action
    every = places(value)
    path = every[int(rng.integers(len(every)))]
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if action == "gone":
        del holder[path[-1]]
    elif action == "extra" and isinstance(holder, dict):
        holder["surprise"] = 1
    else:
        action, holder[path[-1]] = "other", ABSURD[int(rng.integers(len(ABSURD)))]
    text = json.dumps(value).replace('"@DEEP@"', "[" * 5000 + "]" * 5000)
    note = f"{'.'.join(map(str, path))}: {action} {holder[path[-1]]!r:.40}" \
        if action == "other" else f"{'.'.join(map(str, path))}: {action}"
    return text.replace('"@HUGE@"', "9" * 5000), note, action


def typed(hint, value) -> bool:
    """Whether a setting has the annotated type and is finite: written apart from ops/settings."""
    if isinstance(hint, types.UnionType):
        return any(typed(option, value) for option in typing.get_args(hint))
    if dataclasses.is_dataclass(hint) or hint is object:
        hints = typing.get_type_hints(type(value))
        return all(typed(inner, getattr(value, name)) for name, inner in hints.items())
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return type(value) is tuple and all(typed(items[0], v) for v in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if hint is type(None) else type(value) is hint


# ------------------------------------------------------------------------------------------------
# Runs

def run_setup(folder: Path) -> Box:
    """A tiny run after two steps: last/, best/, recipe.json, metrics.jsonl."""
    made = recipe(folder / "run", "--iterations", 2, "--eval-every", 2, "--val-scenes", 1)
    train.train(made, resume=False)
    last = folder / "run" / "last"
    good = {"model": load_file(last / "model.safetensors"), "recipe": read_recipe(
        folder / "run" / "recipe.json"), "moments": load_file(last / "optimizer.safetensors")}
    for path in [*last.iterdir(), folder / "run" / "recipe.json"]:
        good[path.name] = path.read_bytes()
    return Box(folder, copy.deepcopy(good))              # nothing stays mapped to the files


def same_tensors(found: dict, wanted: dict, allowed: bool) -> str:
    """Verdict on accepted tensors: "payload" if only values differ, "wrong" if a check can tell."""
    table = [(n, t.shape, t.dtype) for n, t in sorted(found.items())]
    if not allowed or table != [(n, t.shape, t.dtype) for n, t in sorted(wanted.items())] \
            or not all(t.isfinite().all() for t in found.values()):
        return "wrong"
    return "same" if all(torch.equal(found[n], t) for n, t in wanted.items()) else "payload"


FLOATS = (torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64,
          torch.float8_e4m3fn, torch.float8_e5m2)


def wrong_tensors(tensors: dict, rng) -> tuple[dict, bool, str]:
    """(tensors with one thing wrong, whether that may be accepted, what it is)."""
    tensors, names = dict(tensors), sorted(tensors)
    name = names[int(rng.integers(len(names)))]
    value, action = tensors[name].clone(), int(rng.integers(11))
    if action == 0 and value.is_floating_point():
        tensors[name] = value.to(FLOATS[int(rng.integers(3))])
        return tensors, True, f"{name} as {tensors[name].dtype}"
    if action <= 2:
        kind = OTHERS[int(rng.integers(len(OTHERS)))]
        tensors[name] = value.to(kind)
        return tensors, value.dtype == kind, f"{name} as {kind}"
    if action <= 5 and value.is_floating_point() and value.numel():
        number = float(rng.choice([math.nan, math.inf, -math.inf]))
        value.view(-1)[int(rng.integers(value.numel()))] = number
        tensors[name] = value
        return tensors, False, f"{name} holds {number}"
    if action == 6:
        del tensors[name]
        return tensors, False, f"{name} is missing"
    if action <= 8:
        new = str(rng.choice(["surprise", name + ".x", "", "\x1b[31m", "prompts:zzz"]))
        tensors[new] = value if action == 7 else tensors.pop(name)
        return tensors, False, f"{name} again, or instead, as {new!r}"
    tensors[name] = [value[None], value.reshape(-1)[:1].clone(), torch.zeros(()),
                     torch.zeros(0), torch.cat([value.reshape(-1)] * 2)][rng.integers(5)]
    return tensors, tensors[name].shape == value.shape, f"{name} of shape {tensors[name].shape}"


def model_case(raw: bytes, allowed: bool, box: Box, what: str = "") -> tuple[str, str]:
    """Load last/ with this model.safetensors."""
    put(box.folder / "run/last/model.safetensors", raw)
    return judge(lambda: MetaPromptModel.from_pretrained(box.folder / "run/last").state_dict(),
                 lambda found: same_tensors(found, box.good["model"], allowed), what)


def model_bytes(rng, box):
    """model.safetensors with broken bytes."""
    return model_case(corrupt(box.good["model.safetensors"], rng), True, box)


def model_tensors(rng, box):
    """model.safetensors, well-formed, of wrong tensors."""
    tensors, allowed, what = wrong_tensors(box.good["model"], rng)
    return model_case(save(tensors), allowed, box, what)


def moments_case(raw: bytes, allowed: bool, box: Box, what: str = "") -> tuple[str, str]:
    """Load this optimizer.safetensors, and do a step with it."""
    last = box.folder / "run/last"
    put(last / "optimizer.safetensors", raw)

    def load():
        model = checkpoint.own_memory(MetaPromptModel.from_pretrained(last)).train()
        optimizer = train.build_optimizer(model, box.good["recipe"])
        checkpoint.load_optimizer(last, model, optimizer, 2)
        found = {f"{name}:{key}": value.clone() for name, p in model.named_parameters()
                 for key, value in optimizer.state.get(p, {}).items()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        return found

    return judge(load, lambda found: same_tensors(found, box.good["moments"], allowed), what)


def moments_bytes(rng, box):
    """optimizer.safetensors with broken bytes."""
    return moments_case(corrupt(box.good["optimizer.safetensors"], rng), True, box)


def moments_tensors(rng, box):
    """optimizer.safetensors, well-formed, of wrong tensors."""
    tensors, allowed, what = wrong_tensors(box.good["moments"], rng)
    return moments_case(save(tensors), allowed, box, what)


def config_json(rng, box):
    """config.json: every field in turn; what is accepted must also predict."""
    text, what, action = mutate(json.loads(box.good["config.json"]), rng)
    path = box.folder / "run/last/config.json"
    put(path, text.encode("utf-8", "surrogatepass"))

    def load():
        model = MetaPromptModel.from_pretrained(path.parent)
        with torch.inference_mode():
            model(torch.zeros(1, 3, 64, 64))
        return read_config(path)

    return judge(load, lambda config: "payload" if typed(Config, config) and action != "extra"
                 else "wrong", what)                     # payload: a valid setting, or a default


def recipe_json(rng, box):
    """recipe.json, on resuming."""
    text, what, action = mutate(json.loads(box.good["recipe.json"]), rng)
    path = put(box.folder / "run/recipe.json", text.encode("utf-8", "surrogatepass"))
    names = box.good["recipe"].model.class_names

    def load():
        found = dataclasses.replace(read_recipe(path), out=str(path.parent))
        train.continued(found, names, torch.device("cpu"))
        return found

    def verdict(found):
        if not typed(object, found) or action in ("gone", "extra") \
                or found.model != box.good["recipe"].model:
            return "wrong"
        return "payload"

    return judge(load, verdict, what)


def state_json(rng, box):
    """last/state.json, on resuming."""
    text, what, action = mutate(json.loads(box.good["state.json"]), rng)
    put(box.folder / "run/last/state.json", text.encode("utf-8", "surrogatepass"))
    made = dataclasses.replace(box.good["recipe"], out=str(box.folder / "run"))
    names = made.model.class_names

    def verdict(found):
        state = found[2]
        right = state.step == 2 and typed(checkpoint.State, state) and state.evaluated <= 2
        return "payload" if right and action not in ("gone", "extra") else "wrong"

    return judge(lambda: train.continued(made, names, torch.device("cpu")), verdict, what)


def torn_log(rng, box):
    """metrics.jsonl, torn: its whole lines up to the step are kept, nothing is refused."""
    lines = [json.dumps({"step": i, "loss": i / 7}) for i in range(1, 9)]
    raw = ("\n".join(lines) + "\n").encode()
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(raw)))
        raw = [raw[:place] + bytes(9) + raw[place:], raw[:place], corrupt(raw, rng) or b" ",
               raw + bytes(64), raw[:place] + b"\xff\n\n" + raw[place:]][rng.integers(5)] or b" "
    path = put(box.folder / "metrics.jsonl", raw)
    whole = [json.loads(line) for line in lines if line.encode() in raw.split(b"\n")]
    Log(path, 5).write({"step": 6})
    found = read_log(path)
    kept = all(record in found for record in whole if record["step"] <= 5)
    fine = kept and found[-1] == {"step": 6} and all(r["step"] <= 6 for r in found)
    return ("same" if fine else "wrong"), str(raw[:60])


# ------------------------------------------------------------------------------------------------
# Weights of others

class Bomb:
    """Pickles to a call that would leave a marker."""

    def __init__(self, call, *args):
        self.what = call, args

    def __reduce__(self):
        return self.what


def official_setup(folder: Path) -> Box:
    """The reduced case's depth file, as bytes and as tensors."""
    info = json.loads((Path(__file__).parent / "golden/official_depth.json").read_text())
    path = official_file(info, folder / "good.pth")
    tensors = torch.load(path, weights_only=True)["model"]
    return Box(folder, {"raw": path.read_bytes(), "tensors": tensors, "wanted":
                        MetaPromptModel.from_official(path).state_dict()})


def official_case(path: Path, allowed: bool, box: Box, what: str = "") -> tuple[str, str]:
    """Load one of the authors' files; nothing may run."""
    marker = box.folder / "marker"
    found = judge(lambda: MetaPromptModel.from_official(path).state_dict(),
                  lambda state: same_tensors(state, box.good["wanted"], allowed), what)
    return ("failed", "code was executed") if marker.exists() else found


def official_bytes(rng, box):
    """An authors' file with broken bytes: its zip has checksums."""
    path = put(box.folder / "a.pth", corrupt(box.good["raw"], rng))
    verdict, note = official_case(path, True, box)
    return ("wrong" if verdict == "payload" else verdict), note


def official_tensors(rng, box):
    """An authors' file of wrong tensors or in an odd container."""
    tensors, allowed, what = wrong_tensors(box.good["tensors"], rng)
    odd = [None, [], 3, {}, {"model": 3}, {"model": {1: torch.zeros(1)}}, {"model": []},
           {"state_dict": {"x": "y"}}, torch.zeros(3), {"model": {"encoder.t1": torch.zeros(())}}]
    contents, path = {"model": tensors}, box.folder / "a.pth"
    if rng.random() < 0.3:
        contents, allowed = odd[int(rng.integers(len(odd)))], False
    torch.save(contents, path, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    return official_case(path, allowed, box, what)


def hostile_pickle(rng, box):
    """A pickle whose payload would leave a marker, in three containers; and bombs."""
    marker, path = str(box.folder / "marker"), box.folder / "a.pth"
    calls = [Bomb(os.system, f"touch {marker}"), Bomb(eval, f"open({marker!r}, 'w')"),
             Bomb(exec, f"open({marker!r}, 'w')"), Bomb(open, marker, "w"), Bomb(os.mkdir, marker),
             Bomb(getattr, str, "upper"), Bomb(shutil.copy, str(path), marker)]
    bomb = calls[int(rng.integers(len(calls)))]
    contents = {"model": {**box.good["tensors"], "x": bomb}} if rng.random() < 0.5 else bomb
    kind = int(rng.integers(4))
    if kind < 2:
        torch.save(contents, path, _use_new_zipfile_serialization=kind == 0)
    elif kind == 2:
        put(path, pickle.dumps(bomb, protocol=int(rng.integers(0, 6))))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/data.pkl", b"\x80\x02" + b"(" * int(rng.integers(10 ** 7)) + b".")
            file.writestr("a/version", "3\n")
    return official_case(path, False, box)


def sd_setup(folder: Path) -> Box:
    """A miniature Stable Diffusion: a Hugging Face folder, and one LDM file."""
    torch.manual_seed(0)
    levels = (32, 64, 96, 128)
    unet, vae = UNet(UNetConfig(levels, context_dim=48)), VAEEncoder(VAEConfig(levels))
    single = {}
    for part, module, prefix in (("unet", unet, "model.diffusion_model."),
                                 ("vae", vae, "first_stage_model.")):
        (folder / part).mkdir()
        save_file(module.state_dict(), folder / part / "diffusion_pytorch_model.safetensors")
        single |= {prefix + to_ldm(k, part): v for k, v in module.state_dict().items()}
    unet_config = {"attention_head_dim": 8, "norm_num_groups": 32, "block_out_channels":
                   list(levels), "layers_per_block": 2, "cross_attention_dim": 48, "act_fn": "silu"}
    vae_config = {"norm_num_groups": 32, "block_out_channels": list(levels), "in_channels": 3}
    for part, config in (("unet", unet_config), ("vae", vae_config)):
        (folder / part / "config.json").write_text(json.dumps(config))
    return Box(folder, {"unet": unet_config, "vae": vae_config, "single": single,
                        "raw": save(single), "wanted": unet.state_dict() | vae.state_dict()})


def load_sd(source: Path) -> dict:
    """UNet's and encoder's tensors of a source."""
    return UNet.from_pretrained(str(source)).state_dict() \
        | VAEEncoder.from_pretrained(str(source)).state_dict()


def hf_config(rng, box):
    """A Hugging Face folder's config.json of the UNet or the VAE."""
    part = str(rng.choice(["unet", "vae"]))
    for other in ("unet", "vae"):
        put(box.folder / other / "config.json", json.dumps(box.good[other]).encode())
    text, what, action = mutate(box.good[part], rng)
    put(box.folder / part / "config.json", text.encode("utf-8", "surrogatepass"))
    untold = ("attention_head_dim", "norm_num_groups")   # which no tensor tells

    def verdict(found):
        same = same_tensors(found, box.good["wanted"], True)
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            key = what.split(":")[0].split(".")[0]
            value = json.loads(text)[key]
            known = key in untold and type(value) is not int
            return "wrong" if known or key not in untold and value not in (
                None, box.good[part][key]) else "payload"
        return same

    return judge(lambda: load_sd(box.folder), verdict, what)


def ldm_bytes(rng, box):
    """A single LDM file with broken bytes."""
    path = put(box.folder / "a.safetensors", corrupt(box.good["raw"], rng))
    return judge(lambda: load_sd(path), lambda f: same_tensors(f, box.good["wanted"], True))


def ldm_tensors(rng, box):
    """A single LDM file of wrong tensors."""
    tensors, allowed, what = wrong_tensors(box.good["single"], rng)
    foreign = any("surprise" in n or not n.startswith(("model.", "first")) for n in tensors)
    path = put(box.folder / "a.safetensors", save(tensors))
    return judge(lambda: load_sd(path),
                 lambda f: same_tensors(f, box.good["wanted"], allowed or foreign), what)
