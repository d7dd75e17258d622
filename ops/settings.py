"""Settings as frozen dataclasses: read from JSON with every field checked, and explained.

A field is one line of source, `name: type = value  # what it is and where the value is from`.
The comment is the field's documentation everywhere: in --help, in eval.py's --protocol.
A settings class may hold others; JSON holds them as objects within objects, tuples as lists.
"""
import inspect
import math
import re
import types
import typing
from dataclasses import fields, is_dataclass, replace
from functools import cache

from ops.errors import InputError

# What a setting may be, by its name, in whichever class: (least, most) of a number, of each number
# of a tuple, or the words that are possible.
LIMITS = {
    "method": ("vpd",), "init": ("pretrained", "random-unet", "random"),
    "box": ("nyu", "garg", "eigen"),
    "schedule": ("poly", "two-phase", "step", "power"),
    "precision": ("auto", "bfloat16", "float32"), "weights": ("float32", "bfloat16"),
    "compile": ("auto", "on", "off"),
    "num_prompts": (1, 65536), "num_tokens": (1, 65536), "timestep": (0, 999),
    "refine_steps": (1, 100), "latent_scale": (1e-6, 1e6),
    "num_classes": (0, 255), "head_channels": (1, 65536), "max_depth": (0.01, 1e5),
    "resize_scale": (0, 8), "deconv_channels": (1, 65536), "sigma": (1 / 3, 100),
    "dropout": (0, 0.99), "channels": (1, 65536), "layers": (1, 16), "num_heads": (1, 1024),
    "context_dim": (1, 65536), "latent_channels": (1, 4096), "groups": (1, 4096),
    "iterations": (1, 10**9), "batch": (1, 10**6), "micro_batch": (1, 10**6), "lr": (1e-12, 10),
    "min_lr": (0, 10), "unet_lr_mult": (0, 1000), "muon_lr": (0, 10), "weight_decay": (0, 10),
    "warmup": (0, 10**9), "warmup_ratio": (0, 1), "clip": (0, 1e9), "crop": (32, 16384),
    "crop_width": (32, 16384), "seed": (0, 2**31 - 1), "workers": (0, 256), "log_every": (1, 10**9),
    "eval_every": (1, 10**9), "save_every": (1, 10**9), "train_scenes": (0, 10**7),
    "val_scenes": (1, 10**6), "depth_scale": (1e-3, 1e6), "scale": (32, 65536),
    "window": (32, 16384), "stride": (1, 16384), "ratios": (0.05, 20), "at_once": (1, 65536),
    "max_side": (0, 65536), "windows": (1, 1000), "max_depth_eval": (0.01, 1e5),
    "min_depth_eval": (0, 1e5), "units": (0.01, 65535), "nms": (0, 1), "step": (0, 10**9),
    "evaluated": (0, 10**9),
    # of pretraining
    "size": (64, 4096), "vae_channels": (1, 65536), "unet_channels": (1, 65536),
    "vae_scenes": (1, 10**6), "vae_batch": (1, 10**6), "vae_steps": (1, 10**9), "kl": (0, 1000),
    "gradients": (0, 1000), "scenes": (1, 10**8), "shard": (1, 10**6), "captions": (1, 100),
    "held_out": (4, 10**6), "tokens": (3, 1024), "merges": (0, 10**6), "heads": (1, 1024),
    "width": (1, 65536), "text_layers": (1, 100), "steps": (1, 10**9), "drop": (0, 1),
    "average": (0, 0.999999), "guidance": (0, 1000), "sample_steps": (1, 999), "decay": (0, 1),
    # of single commands
    "seeds": (1, 1000),
}
LINE = re.compile(r"    (\w+): .*?(?:  # (.*))?$")  # of a field: its name and its comment


@cache  # inspect parses the whole file of each class
def comments(kind: type) -> dict[str, str]:
    """Field name -> its comment, "" if it has none; of the base classes, too."""
    found = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        for line in inspect.getsource(base).splitlines():
            match = LINE.match(line)
            if match and match[1] in kind.__dataclass_fields__:
                found[match[1]] = match[2] or ""
    return found


def from_dict(kind: type, values: dict, where: str):
    """`values`, parsed JSON, as an instance of the dataclass `kind`.

    Raises InputError, which begins with `where`, for a field that is unknown, missing, of another
    type or not finite.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object with the fields of {kind.__name__}")
    known, hints = [field.name for field in fields(kind)], typing.get_type_hints(kind)
    for name in values:
        if name not in known:
            raise InputError(f"{where}: unknown field {name!r:.60}; known: {', '.join(known)}")
    for name in known:
        if name not in values:
            raise InputError(f"{where} lacks the field {name}")
    made = kind(**{name: checked(hints[name], values[name], f"{where}: {name}", name)
                   for name in known})
    if "channels" in known:
        check_widths(made, f"{where}: ")
    return made


def checked(hint, value, where: str, name: str = ""):
    """A JSON value as the annotation `hint` wants it; InputError if it is of another type, or not
    what LIMITS says of a setting `name`.
    """
    if is_dataclass(value) or hint is object:
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if is_dataclass(option):
            return from_dict(option, value, where)
        if fits(option, value):
            check_limits(value, where, name)
            return tuple(value) if typing.get_origin(option) is tuple else value
    raise InputError(f"{where} is {value!r:.60}, but should be "
                     + " or ".join(in_words(option) for option in options))


def check_limits(value, where: str, name: str) -> None:
    """InputError if a value of the right type is out of LIMITS."""
    limits = LIMITS.get(name)
    if limits is None or value is None:
        return
    if isinstance(limits[0], str):
        if value not in limits:
            raise InputError(f"{where} is {value!r:.60}, possible are {', '.join(limits)}")
        return
    low, high = limits
    if value == () or value == []:
        raise InputError(f"{where} is empty: a number or more from {low:g} to {high:g}")
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if not low <= number <= high:
            raise InputError(f"{where} is {value!r:.60}, possible is {low:g} to {high:g}")


def check_widths(part, where: str) -> None:
    """InputError unless a backbone's `channels` are four multiples of its groups and heads."""
    for divisor in ("groups", "num_heads"):
        number = getattr(part, divisor, 1)
        if len(part.channels) != 4 or any(width % number for width in part.channels):
            name = divisor.replace("_", "-") if where.startswith("--") else divisor
            raise InputError(f"{where}channels {part.channels}: four multiples of {where}{name} "
                             f"{number}")
    dim = getattr(part, "context_dim", 0)
    if dim % 16 or dim and part.channels[0] % 16:        # the groups of the necks' norms
        raise InputError(f"{where}channels {part.channels} with a context of {dim}: the first of "
                         "the channels and the context are multiples of 16")


def in_words(kind) -> str:
    """A plain type or a tuple of one, as a user would say it."""
    names = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false",
             type(None): "null"}
    if typing.get_origin(kind) is not tuple:
        return names[kind]
    items = typing.get_args(kind)
    count = "" if items[-1] is Ellipsis else f"{len(items)} "
    return f"a list of {count}({names[items[0]]})"


def fits(kind, value) -> bool:
    """Whether a value is of a plain type or a tuple of one; an int is a float, a bool no int."""
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            return False
        items = items[:1] * len(value) if items[-1] is Ellipsis else items
        return len(items) == len(value) and all(map(fits, items, value))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) \
            and math.isfinite(value)
    return type(value) is kind


def leaves(settings, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Path of field names -> value, for every field that is not itself a settings class."""
    found = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        here = (*path, field.name)
        found.update(leaves(value, here) if is_dataclass(value) else {here: value})
    return found


def with_leaves(settings, changes: dict[tuple[str, ...], object]):
    """A copy of `settings` in which the fields at the paths of `changes` have other values."""
    direct = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        inner = {path[1:]: value for path, value in changes.items() if path[0] == name}
        direct[name] = with_leaves(getattr(settings, name), inner)
    return replace(settings, **direct)
