"""The command line of a recipe: one flag per field, named and explained by the field itself.

    --num-prompts        Recipe.model.num_prompts
    --unet-channels      Recipe.model.unet.channels; so for vae
    --window             Recipe.protocol.window
    --train-list         Recipe.files.train_list

Which flags there are depends on task and data set: one that is not in the row's settings, or that
another setting makes idle, is refused.
"""
import argparse
import re
import types
import typing
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ops.errors import InputError
from ops.settings import checked, comments, leaves, with_leaves
from tasks.captioned import CAPTIONS, CaptionConfig
from tasks.recipes import ROWS, Recipe, check, find_recipe, read_recipe, tiny
from vpd.text import Tokenizer
from weights.files import read_tensors

FieldPath = tuple[str, ...]  # names of the fields that lead to a setting

UNFIT = re.compile(r"^$|[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # as a word of a command line
FOUND_OUT = ("task", "method", "class_names", "num_classes", "fixed_prompts",
             "caption_prompts")  # no flags
UNUSED = {  # fields of the model and the run that a method's task does not read
    ("meta-prompts", "seg"): ("max_depth", "deconv_channels", "sigma", "crop_width",
                              "scene_types"),
    ("meta-prompts", "depth"): ("dropout", "deconv_channels", "sigma", "crop_width",
                                "scene_types"),
    ("meta-prompts", "pose"): ("dropout", "head_channels", "max_depth", "resize_scale",
                               "scene_types"),
    ("vpd", "seg"): ("num_tokens", "max_depth", "crop_width", "scene_types", "init", "init_from"),
    ("vpd", "depth"): ("num_tokens", "map_gradient", "dropout", "crop_width", "init", "init_from"),
    ("vpd", "refer"): ("head_channels", "max_depth", "dropout", "prompts", "scene_types", "init",
                       "init_from"),
}


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, no flag can be shortened, and no text is empty or breaks
    a line.
    """

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        """What all parsing goes through: (namespace, unknown words)."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, str) and UNFIT.search(value):
                raise InputError(f"--{name.replace('_', '-')} is {value!r}: leave it out, or give "
                                 "a value that can be printed in one line")
        return found, rest

    def error(self, message: str):
        """What argparse calls for a wrong command line."""
        raise InputError(message)


def flag_paths(recipe: Recipe) -> dict[str, FieldPath]:
    """Name of a flag, with underscores -> where its value lies in a recipe of this task and set."""
    found, none = {}, ("dataset", *FOUND_OUT, *UNUSED[recipe.method, recipe.task])
    for path in leaves(recipe):
        name = "_".join(path[-2:]) if path[-2:-1] in (("unet",), ("vae",)) else path[-1]
        if path[-1] not in none:
            found[name] = path
    return found


def owner_of(recipe: Recipe, path: FieldPath):
    """The settings object that holds the field at `path`."""
    for name in path[:-1]:
        recipe = getattr(recipe, name)
    return recipe


def show(value) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def read_word(text: str):
    """A word of the command line as JSON would hold it: null, an integer, a number, or text."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def add_flags(parser: Parser, recipe: Recipe, sections: tuple[str, ...],
              leave_out: tuple[str, ...] = ()) -> None:
    """A flag for every setting below the `sections` of the recipe, its value there as default."""
    for name, path in flag_paths(recipe).items():
        if path[0] not in sections or name in leave_out:
            continue
        owner, flag = owner_of(recipe, path), "--" + name.replace("_", "-")
        value = getattr(owner, path[-1])
        text = f"{comments(type(owner))[path[-1]]} [{show(value)}]".replace("%", "%%")
        hint = typing.get_type_hints(type(owner))[path[-1]]
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text,
                                default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, nargs="+" if "tuple" in str(hint) else None, metavar="X",
                                help=text, default=argparse.SUPPRESS)


def value_of(owner, name: str, words, flag: str):
    """The words of a flag as the field `name` of `owner` wants them; InputError otherwise."""
    hint = typing.get_type_hints(type(owner))[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(words, list):
        value = [read_word(word) for word in words]
        value = None if value == [None] else value
    elif str in kinds:
        value = None if words == "none" and type(None) in kinds else words
    else:
        value = read_word(words) if isinstance(words, str) else words
    return checked(hint, value, flag, name)


def with_flags(recipe: Recipe, given: dict) -> Recipe:
    """The recipe with the flags that were given, {name: words}; InputError for a wrong value."""
    paths, changes = flag_paths(recipe), {}
    for name, words in given.items():
        owner, flag = owner_of(recipe, paths[name]), "--" + name.replace("_", "-")
        changes[paths[name]] = value_of(owner, paths[name][-1], words, flag)
    return with_leaves(recipe, changes)


def parse(parser: Parser, arguments: list[str], recipe: Recipe) -> argparse.Namespace:
    """parser.parse_args, whose refusal says what an unknown flag belongs to."""
    args, rest = parser.parse_known_args(arguments)
    for word in rest:
        name = word.removeprefix("--").split("=")[0].replace("-", "_").removeprefix("no_")
        if not word.startswith("--"):
            raise InputError(f"{word} stands alone: values follow a --flag")
        rows = [f"{row.task} on {row.dataset}" for rows in ROWS.values() for row in rows.values()
                if name in flag_paths(row)]
        rows = list(dict.fromkeys(rows))
        if name in flag_paths(recipe):
            raise InputError(f"{word} is no flag of this command: it would do nothing here")
        where = f"; it is one of {', '.join(rows)}" if rows else ""
        raise InputError(f"{word} is no setting of {recipe.task} on {recipe.dataset}{where}")
    return args


# ------------------------------------------------------------------------------------------------
# train.py's recipe

SECTIONS = tuple(Recipe.__dataclass_fields__)
HELP = ("-h", "--help")  # is answered when the row, and so its flags, are known


def resolve(arguments: list[str], description: str = "") -> tuple[Recipe, bool]:
    """(recipe, whether a run is resumed) of train.py's command line; InputError if impossible.

    The row of --task and --dataset, on a tiny backbone where that is asked for, and what was given.
    """
    first = Parser("")
    first.add_argument("--task", default="seg")
    first.add_argument("--dataset", default="shapes")
    first.add_argument("--backbone")
    first.add_argument("--method")
    chosen, _ = first.parse_known_args([a for a in arguments if a not in HELP])
    if (run := resumed(arguments)) is not None:
        return replace(read_recipe(run / "recipe.json"), out=str(run)), True
    row = find_recipe(chosen.task, chosen.dataset, chosen.method)
    row = tiny(row) if chosen.backbone == "tiny" and row.backbone != "tiny" else row
    parser = Parser(description)
    parser.add_argument("--resume", metavar="RUN", help="continue RUN with its own recipe")
    parser.add_argument("--task", help="seg, depth, pose, or VPD's refer [seg]")
    parser.add_argument("--method", help="meta-prompts or vpd [meta-prompts; vpd for refer]")
    names = ", ".join(name for task, name in ROWS[row.method] if task == row.task)
    parser.add_argument("--dataset", help=f"{names} [shapes]")
    add_flags(parser, row, SECTIONS)
    given = vars(parse(parser, arguments, row))
    given = {name: words for name, words in given.items()
             if name not in ("task", "method", "dataset", "resume")}
    return finish(with_flags(row, given), given), False


def resumed(arguments: list[str]) -> Path | None:
    """The run of --resume RUN, which takes no other flag; None without it, or InputError."""
    only = Parser("")
    only.add_argument("--resume")
    chosen, others = only.parse_known_args([a for a in arguments if a not in HELP])
    if chosen.resume is None or UNFIT.search(chosen.resume):
        return None                                      # the latter is refused by `parse`
    if others:
        raise InputError(f"--resume RUN takes the run's recipe: leave out {others[0]}")
    return Path(chosen.resume)


def finish(recipe: Recipe, given: dict) -> Recipe:
    """The recipe with what follows from its settings; InputError if they can't work together."""
    check_idle(recipe, given)
    if recipe.weights == "bfloat16" and recipe.precision == "auto":
        recipe = replace(recipe, precision="bfloat16")
    check(recipe)
    if recipe.prompts and recipe.method == "meta-prompts":
        recipe = with_prompts(recipe, given)
    if recipe.init == "random":
        recipe = replace(recipe, model=replace(recipe.model, train_encoder=True))
    if getattr(recipe.protocol, "max_side", None) == 0:
        recipe = replace(recipe, protocol=replace(recipe.protocol, max_side=2 * recipe.crop))
    return replace(recipe, out=recipe.out or free_folder(f"runs/{recipe.task}-{recipe.dataset}"))


def check_idle(recipe: Recipe, given: dict, tta: bool = False, pictures: bool = False) -> None:
    """InputError for a given flag that another setting makes idle, or eval.py's --tta; `pictures`:
    the user's own are predicted, not the data set's.
    """
    rendered = recipe.dataset == "shapes" and not (pictures or tta)
    widths = [name for name in given if name.startswith(("unet_c", "unet_g", "unet_la", "vae_"))]
    of_encoder = [name for name in widths if name.startswith(("vae_", "unet_latent"))]
    unread = recipe.init == "random" or recipe.init_from is not None
    configured = recipe.init == "pretrained" \
        and not Path(recipe.unet or recipe.backbone).expanduser().is_file()
    idle = [(("min_lr",), recipe.schedule != "two-phase", f"--schedule {recipe.schedule}"),
            (("warmup", "warmup_ratio"), recipe.schedule in ("two-phase", "power"),
             f"--schedule {recipe.schedule}"),
            (("stride",), getattr(recipe.protocol, "window", 1) is None, "no --window"),
            (("ratios", "flip"), tta, "--tta, which sets it"),
            (("scale",), rendered and getattr(recipe.protocol, "ratios", ()) == (1.0,),
             "scenes rendered at the size of --crop"),
            (widths, recipe.init == "pretrained", "pretrained weights, whose files say the widths"),
            (("unet_num_heads",), configured, "pretrained weights, whose config.json says it"),
            (("backbone",), unread and recipe.backbone != "tiny",
             "--init-from, or --init random: no file of it is read"),
            (("unet",), recipe.init != "pretrained" or recipe.init_from is not None,
             "--init random, random-unet or --init-from: no other UNet is read"),
            (("init",), recipe.init_from is not None and recipe.init == "random-unet",
             "--init-from, whose UNet is taken"),
            (("box", "max_depth_eval"), pictures, "--image, which has no truth"),
            (("at_once",), pictures and recipe.task != "pose", "--image: one picture at a time"),
            (("train_encoder",), recipe.init == "random", "a random encoder, which is trained"),
            (of_encoder, recipe.init == "random-unet", "a pretrained encoder, whose files say it")]
    for names, applies, why in idle:
        for name in names:
            if applies and name in given:
                raise InputError(f"--{name.replace('_', '-')} would do nothing: the recipe has "
                                 f"{why}")


def with_prompts(recipe: Recipe, given: dict) -> Recipe:
    """The recipe for --prompts: N is the file's, or the number of a caption's tokens; there is an
    adapter unless it was ruled out.

    The paper compares label and caption prompts (4.3) without saying how they enter the model; that
    they go through the depth model's adapter is ours.
    """
    model = recipe.model
    if recipe.prompts == CAPTIONS:
        count, model = caption_length(recipe), CaptionConfig(**vars(model))
    else:
        count = len(read_prompts(Path(recipe.prompts), model.unet.context_dim))
    if "num_prompts" in given and model.num_prompts != count:
        raise InputError(f"--num-prompts {model.num_prompts}: --prompts {recipe.prompts} "
                         f"holds {count}, which is N; leave --num-prompts out")
    adapter = model.prompt_adapter if "prompt_adapter" in given else True
    return replace(recipe, model=replace(model, num_prompts=count, fixed_prompts=True,
                                         prompt_adapter=adapter))


def caption_length(recipe: Recipe) -> int:
    """Tokens of a caption, of the backbone's own tokenizer; InputError if the recipe has none."""
    if not has_captions(recipe):
        raise InputError(f"--prompts {CAPTIONS}: {recipe.task} on {recipe.dataset} has none; the "
                         "embedded scenes of seg and depth have")
    if recipe.init != "pretrained" or recipe.init_from:
        raise InputError(f"--prompts {CAPTIONS} is about a pretrained backbone, whose own text "
                         "encoder reads them: leave out --init and --init-from")
    return Tokenizer.from_pretrained(recipe.backbone).length


def has_captions(recipe: Recipe) -> bool:
    """Whether the data set knows a caption of each image."""
    return recipe.dataset == "shapes" and recipe.task in ("seg", "depth")


def read_prompts(path: Path, dim: int) -> Tensor:
    """The one tensor of a .safetensors file, (N, dim), in float32; InputError for anything else."""
    tensors = read_tensors(path)
    tensor = next(iter(tensors.values()))
    if len(tensors) > 1 or tensor.shape != (tensor.numel() // dim, dim) or not tensor.numel() \
            or not tensor.is_floating_point() or not tensor.float().isfinite().all():
        raise InputError(f"--prompts {path} holds {len(tensors)} tensors, the first of shape "
                         f"{tuple(tensor.shape)} and {tensor.dtype}: one of finite floats (N, {dim}"
                         f"), a text embedding per row, is wanted; --unet-context-dim is {dim}")
    return tensor.float()


def free_folder(base: str) -> str:
    """`base`, or base-2, base-3, ... if it exists: no run overwrites another."""
    path, number = base, 1
    while Path(path).exists():
        number += 1
        path = f"{base}-{number}"
    return path
