"""Evaluation: one trained model, on a labelled set or on your own pictures.

    python eval.py --checkpoint runs/seg-shapes
    python eval.py --checkpoint runs/seg-ade20k --data /path/to/ADEChallengeData2016
    python eval.py --official nyu.ckpt --task depth --dataset nyu --data DATA --val-list LIST
    python eval.py --checkpoint runs/pose-coco --boxes COCO_val2017_detections_AP_H_56_person.json
    python eval.py --checkpoint RUN --image FILE|FOLDER              your own pictures
    python eval.py --checkpoint RUN --protocol                       what would be done

Settings come from the run's recipe; how whole images are predicted is its protocol (tasks/), any
field of which is a flag here.  With --image, any size and aspect, no labels:

    task   for programs                                                 for people
    seg    NAME_labels.png: class numbers from 0, with a palette        NAME_overlay.png
    depth  NAME_depth.png: 16 bit, a fixed number per metre             NAME_depth_colour.png
    pose   keypoints.json: COCO results with "file_name", for all       NAME_people.png

NAME is the file's name without its suffix; with it where two files of a folder share the rest.
Where the protocol says nothing about size, the longer side is reduced to --max-side; results have
the image's own size.  --boxes: see sets/coco.py; without it one person fills the image.
"""
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm

import data
from model import Config, MetaPromptModel
from ops.device import cast_weights, pick_device, pick_precision
from ops.errors import InputError, run_command
from ops.settings import checked, comments
from sets.files import IMAGE_SUFFIXES, check_outside, load_image, output_names
from tasks import TASKS, card, depth, methods, seg
from tasks.flags import Parser, add_flags, check_idle, flag_paths, parse, show, with_flags
from tasks.predictor import find_checkpoint, recipe_of, with_max_side
from tasks.recipes import Recipe, find_recipe
from tasks.recipes import check as check_recipe
from weights.checkpoint import write_json, write_text

COMMANDS = ("checkpoint", "official", "task", "method", "dataset", "image", "boxes", "tta",
            "say_protocol", "out", "export", "save", "device", "precision", "compile",
            "workers")  # flags that are no settings
TRAINING = ("train_scenes", "train_json", "augment", "extra_images", "extra_labels", "extra_suffix",
            "extra_label_ids")  # settings of a data set that only its training split has


def main() -> None:
    """Load, say what will be done, then do it."""
    args, recipe, model, source = load(sys.argv[1:])
    if args.say_protocol:
        print(in_words(recipe))
        return
    device = pick_device(args.device)
    dtype = pick_precision(args.precision or ("float32" if args.official else "auto"), device)
    out = default_out(args, recipe, source)
    check_results(recipe, args, out)
    if args.save:
        save(model, recipe, Path(args.save))
        print(f"wrote {args.save}: the model in this project's format")
    cast_weights(model, dtype)
    print(f"model      {source}: {model.config}\nprotocol   {recipe.protocol}\n"
          f"device     {device}, {dtype}\nout        {out}")
    methods.with_reader(model.to(device).eval(), recipe.backbone)
    if args.compile:
        methods.compile_parts(model)
    if args.image:
        predict_pictures(model, recipe, args, out, dtype)
    else:
        evaluate_set(model, recipe, args, out, dtype, source)


# ------------------------------------------------------------------------------------------------
# What is evaluated, and how

def load(arguments: list[str]) -> tuple:
    """(arguments, recipe, model, file or folder read); InputError if they don't fit each other.

    The recipe is the run's, or the row of --dataset; flags may change its files and its protocol.
    """
    first = Parser("")
    for name in ("checkpoint", "official", "task", "method", "dataset", "image"):
        first.add_argument(f"--{name}")
    chosen, _ = first.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    if chosen.checkpoint and not chosen.official:
        source = find_checkpoint(chosen.checkpoint)
        model = methods.load(source)
        recipe = recipe_of(source, model.config, chosen.dataset, bool(chosen.image))
    elif chosen.official and chosen.task and chosen.dataset:
        source = Path(chosen.official)
        recipe = find_recipe(chosen.task, chosen.dataset, chosen.method)
        model = methods.load_official(source, recipe.model)
    else:
        model = source = None                            # for --help, or to be refused
        recipe = find_recipe(chosen.task or "seg", chosen.dataset or "shapes", chosen.method)
    sections = ("protocol",) if chosen.image else ("files", "protocol")
    parser = command_parser(recipe, sections)
    args = parse(parser, arguments, recipe)
    if model is None:
        raise InputError("give --checkpoint RUN, or --official FILE with --task and --dataset, "
                         "which the authors' files do not hold")
    check(args)
    given = {name: words for name, words in vars(args).items()
             if name not in COMMANDS and name in flag_paths(recipe)}
    recipe = with_flags(recipe, given)
    check_recipe(recipe)
    check_idle(recipe, given, args.tta, bool(args.image))
    return args, settle(recipe, args, model.config), model, source


def command_parser(recipe: Recipe, sections: tuple[str, ...]) -> Parser:
    """This command's own flags, and those of the recipe's settings in `sections`."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", help="run folder of train.py, or a saved model")
    parser.add_argument("--official", metavar="FILE", help="one of the authors' .pth / .ckpt files")
    parser.add_argument("--task", help="seg, depth or refer; needed only with --official")
    parser.add_argument("--method", help="meta-prompts or vpd; needed only with --official")
    parser.add_argument("--dataset", help="default: the run's")
    parser.add_argument("--image", metavar="FILE|FOLDER", help="predict your own pictures instead")
    parser.add_argument("--boxes", metavar="FILE",
                        help="pose: detected boxes; default: the annotated people's")
    parser.add_argument("--tta", action="store_true", help="seg: scales and mirror images")
    parser.add_argument("--protocol", dest="say_protocol", action="store_true",
                        help="say what would be done, and stop")
    parser.add_argument("--out", help="folder for pictures and metrics; default: RUN/eval, "
                        "with --boxes RUN/eval-BOXES, with --image RUN/predictions")
    parser.add_argument("--export", help="folder for seg: label PNGs as the benchmark's server "
                        "wants them; depth: 16-bit PNGs in its unit; pose: keypoints.json; refer: "
                        "masks, IMAGE_NUMBER.png")
    parser.add_argument("--save", help="write the model in our format into this folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"],
                        help="default: auto; float32 for an --official file")
    parser.add_argument("--compile", action="store_true",
                        help="compile the model for each size of image: large sets of one size")
    parser.add_argument("--workers", type=int, default=1, help="processes that load data")
    add_flags(parser, recipe, sections, leave_out=(*COMMANDS, *TRAINING))
    return parser


def check(args) -> None:
    """InputError for flags that don't go together, before anything is computed."""
    if args.checkpoint and args.official:
        raise InputError("--official and --checkpoint name two models: give one")
    for flag, folder in (("--out", args.out), ("--export", args.export), ("--save", args.save)):
        if folder is not None:
            check_folder(flag, folder)
    for name in ("max_side", "sentence"):
        if args.image is None and hasattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is about your own pictures: it needs "
                             "--image")
    if args.image is None and args.export is None and hasattr(args, "units"):
        raise InputError("--units is about exported maps: it needs --export or --image")
    if args.say_protocol and (args.save or args.export):
        raise InputError("--protocol says what would be done and stops: leave out --save, --export")
    checked(int, args.workers, "--workers", "workers")
    if args.save and any((Path(args.save) / name).exists() for name in
                         ("config.json", "model.safetensors", "recipe.json")):
        raise InputError(f"--save {args.save} holds a model already: give another folder")
    if args.image is None:
        return
    if args.export is not None:
        raise InputError("--export is about a labelled data set: leave it out with --image")
    out, source = Path(args.out or "."), Path(args.image).expanduser()
    if not source.exists():
        raise InputError(f"--image {source} does not exist: an image file or a folder of images")
    if args.out and out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise InputError(f"--out {out} is the folder of the images: the next run would take the "
                         "results for images")


def check_results(recipe: Recipe, args, out: Path) -> None:
    """InputError if a result would replace a file that the command reads, such as annotations."""
    given = (args.boxes, *vars(recipe.files).values())
    read = [Path(value).resolve() for value in given if isinstance(value, str)]
    for folder in (out, Path(args.export or out)):
        for name in ("metrics.json", "keypoints.json", "pictures.png"):
            if (folder / name).resolve() in read:
                raise InputError(f"{folder / name} is read by this command and would be replaced: "
                                 "give another --out or --export")


def check_folder(flag: str, folder: str) -> None:
    """InputError unless a folder can be written: noticed before the work, not after it."""
    new = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in new:                                 # nothing is left of a refused command
            path.rmdir()
    except OSError as error:
        raise InputError(f"{flag} {folder} can't be written: {error}") from None


def check_new_file(flag: str, text: str, suffix: str) -> Path:
    """The file to write; InputError if it can't be, is there already, or has another suffix."""
    path = Path(text)
    if path.suffix != suffix:
        raise InputError(f"{flag} {text}: its name must end in {suffix}")
    if path.exists():
        raise InputError(f"{flag} {path} exists: give another name, or remove it")
    check_folder(flag, str(path.parent))
    return path


def settle(recipe: Recipe, args, config: Config) -> Recipe:
    """The recipe of this evaluation: the model's own config, --tta, --boxes, --max-side."""
    for name, own in (("task", config.task), ("method", methods.method_of(config))):
        if getattr(args, name) not in (None, own):
            raise InputError(f"--{name} {getattr(args, name)}: the model's {name} is {own}")
    recipe = replace(recipe, model=config)
    if args.tta and recipe.task != "seg":
        raise InputError("--tta is for segmentation: depth and pose have their mirror images in "
                         "the protocol, other scales would change metres and joints' blobs")
    if args.tta:
        recipe = replace(recipe, protocol=seg.with_tta(recipe.protocol, recipe.method))
    if args.boxes and not (recipe.task == "pose" if args.image else hasattr(recipe.files, "boxes")):
        raise InputError(f"--boxes {args.boxes}: {recipe.task} on {recipe.dataset} takes none")
    if args.boxes and not args.image:
        recipe = replace(recipe, files=replace(recipe.files, boxes=args.boxes))
    return with_max_side(recipe)


def in_words(recipe: Recipe) -> str:
    """What the protocol does: a line `field  value  # why` each."""
    why = comments(type(recipe.protocol))
    rows = [(name, show(value), why[name]) for name, value in vars(recipe.protocol).items()]
    wide = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join([f"{recipe.task} on {recipe.dataset}",
                      *(f"{a:{wide[0]}}  {b:{wide[1]}}  # {c}" for a, b, c in rows)])


def save(model: MetaPromptModel, recipe: Recipe, folder: Path) -> None:
    """Write the model, its recipe without this machine's paths, and its card."""
    model.save_pretrained(folder)
    write_json(folder / "recipe.json", asdict(card.shareable(recipe)))
    write_text(folder / "README.md", card.model_card(recipe))


def default_out(args, recipe: Recipe, source: Path) -> Path:
    """Where results go if --out does not say; never two files of boxes in one place."""
    root = source.parent if args.checkpoint else Path("runs") / f"official-{recipe.dataset}"
    if args.image:
        return Path(args.out or root / "predictions")
    if args.out or not args.checkpoint:
        return Path(args.out or root)
    return root / (f"eval-{Path(args.boxes).stem}" if args.boxes else "eval")


# ------------------------------------------------------------------------------------------------
# A labelled set

def evaluate_set(model: MetaPromptModel, recipe: Recipe, args, out: Path, dtype: torch.dtype,
                 source: Path) -> None:
    """Print the metrics, write them and pictures into `out`."""
    check_outside(out, getattr(recipe.files, "data", None))
    dataset, task = data.open_set(recipe, "val"), TASKS[recipe.task]
    print(f"data       {recipe.dataset}: {dataset.check()}")
    if recipe.task == "depth":
        depth.check_range(dataset, recipe)
    export = Path(args.export) if args.export else out if recipe.task == "pose" else None
    check_export(args.export, getattr(recipe.files, "data", None))
    metrics = task.evaluate(model, dataset, recipe.protocol, dtype, workers=args.workers,
                            sheet=out / "pictures.png", export=export)
    task.report(metrics, dataset)
    write_report(out / "metrics.json", {"checkpoint": str(source), "dataset": recipe.dataset,
                                        "images": len(dataset),
                                        "protocol": asdict(recipe.protocol), **metrics})
    print(f"wrote {out / 'metrics.json'} and {out / 'pictures.png'}"
          + (f", {args.export}" if args.export else ""))


def check_export(export: str | None, data_folder: str | None) -> None:
    """InputError if exported answers would lie among the data set's own files."""
    if not export or not data_folder or not Path(export).is_dir():
        return
    folder, root = Path(export).resolve(), Path(data_folder).resolve()
    if root in (folder, *folder.parents) and any(folder.iterdir()):
        raise InputError(f"--export {export} is inside --data {data_folder} and holds files: "
                         "answers could replace the truth; give an empty folder")


def summary(metrics: dict) -> str:
    """The scalar metrics in one line."""
    return "  ".join(f"{k} {v:.4f}" if v >= 0 else f"{k} n/a"  # n/a: nobody of that size
                     for k, v in metrics.items() if isinstance(v, float))


def write_report(path: Path, report: dict) -> None:
    """Write a report as strict JSON, which knows no nan: null stands for it."""
    def clean(value):
        """The value, its nan as None, in lists, too."""
        if isinstance(value, list):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and np.isnan(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {k: clean(v) for k, v in report.items()})


# ------------------------------------------------------------------------------------------------
# Your own pictures

def predict_pictures(model: MetaPromptModel, recipe: Recipe, args, out: Path,
                     dtype: torch.dtype) -> None:
    """Predict the pictures of --image, write results into `out`, say what was done."""
    task, (root, files) = TASKS[recipe.task], find_images(args.image, out)
    ready = task.prepare(recipe, args.boxes)
    if args.boxes and not any(task.boxes_of(ready, file) for file in files):
        raise InputError(f"{args.boxes} has no box for any of the {len(files)} images, such as "
                         f"{files[0].as_posix()}: see the formats in sets/coco.py")
    print(f"images     {len(files)} in {root}")
    start = time.perf_counter()
    done, skipped = apply_all(model, recipe, ready, root, files, out, dtype)
    seconds = time.perf_counter() - start
    for message in skipped:
        print(f"skipped    {message}")
    print(f"{done} images in {seconds:.1f} s, reading and writing included: "
          f"{done / seconds:.2f} images/s" + (f"; {len(skipped)} skipped" if skipped else ""))
    print(f"wrote {out}/: {task.written(recipe, ready)}")


def apply_all(model: MetaPromptModel, recipe: Recipe, ready, root: Path, files: list[Path],
              out: Path, dtype: torch.dtype) -> tuple[int, list[str]]:
    """Predict and write every picture; returns how many, and why the others were skipped."""
    skipped, results = [], []
    for file, name in zip(tqdm(files, desc="predict", unit="image", leave=False),
                          output_names(files)):
        try:
            image = load_image(root / file)
        except InputError as error:
            skipped.append(str(error))
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        results += TASKS[recipe.task].apply(model, image, file, out / name, recipe, dtype, ready)
    if len(skipped) == len(files):
        raise InputError(skipped[0] if len(files) == 1 else
                         f"none of the {len(files)} images can be read: {skipped[0]}")
    if recipe.task == "pose":
        write_text(out / "keypoints.json", json.dumps(results))
    return len(files) - len(skipped), skipped


def find_images(source: str, out: Path) -> tuple[Path, list[Path]]:
    """(folder, image files relative to it, sorted) of an image file or a folder, subfolders too.

    What lies in `out` is left out: results of an earlier run.  InputError if there is no image.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [Path(path.name)]
    inside, out = path.resolve() in out.resolve().parents, out.resolve()
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES
                   and p.is_file() and not (inside and out in p.resolve().parents))
    if not found:
        raise InputError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return path, [p.relative_to(path) for p in found]


if __name__ == "__main__":
    run_command(main)
