"""The campaign's corrupted data sets and command lines, as campaign_cases.py."""
import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from campaign_cases import Box, corrupt, judge, mutate, put, run_setup, typed
from helpers import HEAD, SCENES, TINY, write_run
from PIL import Image
from trees import cut, detection, make_people

import eval as evaluation
import train
from ops.errors import run_command
from ops.settings import leaves
from sets import ade20k, coco, files, nyu_kitti
from tasks.flags import flag_paths, resolve
from tasks.recipes import RECIPES, Recipe

# ------------------------------------------------------------------------------------------------
# Pictures

MODES = ("RGB", "L", "P", "1", "I;16", "I", "F", "RGBA", "LA", "CMYK")


def pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """"FORMAT MODE" -> (file, its pixels), for whatever Pillow can write and read."""
    Image.init()
    rng, found = np.random.default_rng(0), {}
    smooth = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((48, 40))
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN)):
        for mode in MODES:
            with contextlib.suppress(Exception):
                image = smooth.convert("L").convert(mode) if ";" in mode else smooth.convert(mode)
                image.save(file := io.BytesIO(), format=kind)
                with Image.open(io.BytesIO(file.getvalue())) as again:
                    found[f"{kind} {mode}"] = file.getvalue(), np.array(again)
    return found


def pictures_setup(folder: Path) -> Box:
    """All formats; and three with EXIF."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9003] = 6, "maker", "2020:01:01 00:00:00"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    tagged = {}
    for kind in ("JPEG", "PNG", "WEBP"):
        Image.new("RGB", (32, 24), "red").save(file := io.BytesIO(), format=kind, exif=exif)
        tagged[kind] = file.getvalue()
    return Box(folder, {"files": pictures(), "exif": tagged})


CHECKED = ("PNG",)  # formats with a checksum over their pixels


def decode_case(load, rng, box, allowed) -> tuple[str, str]:
    """Load a broken picture of any format."""
    names = sorted(box.good["files"])
    if rng.random() < 0.4:                               # the usual ones
        names = [name for name in names if name.split()[0] in ("PNG", "JPEG", "TIFF")]
    name = names[int(rng.integers(len(names)))]
    raw, pixels = box.good["files"][name]
    broken = corrupt(raw, rng) if rng.random() < 0.9 else raw
    path = put(box.folder / "a.png", broken)

    def verdict(found):
        with Image.open(path) as image:
            kind, mode = image.format, image.mode
        if not allowed(mode) or found.ndim != (3 if load is files.load_image else 2):
            return "wrong"
        if broken == raw:
            return "same"
        with Image.open(path) as image:
            same = image.size == pixels.shape[1::-1] and np.array_equal(np.array(image), pixels)
        return "same" if same else "wrong" if kind in CHECKED else "payload"

    found = judge(lambda: load(path), verdict)
    return found[0], f"{found[1]} {name} {'as it is' if broken == raw else ''}"


def images(rng, box):
    """Images, in every format that Pillow writes."""
    return decode_case(files.load_image, rng, box, lambda mode: mode != "F")


def labels(rng, box):
    """Label files."""
    return decode_case(files.load_label, rng, box,
                       lambda mode: mode in ("1", "L", "P", "I", "I;16", "I;16B"))


def depths(rng, box):
    """Depth maps."""
    return decode_case(files.load_depth, rng, box, lambda mode: mode in ("I", "I;16", "I;16B"))


def exif(rng, box):
    """Images whose EXIF is broken; as a pair with a label, too."""
    kind = str(rng.choice(sorted(box.good["exif"])))
    data = bytearray(box.good["exif"][kind])
    start = max(data.find(b"Exif"), data.find(b"eXIf"), data.find(b"EXIF"))
    for _ in range(int(rng.integers(1, 6))):
        data[min(start + int(rng.integers(160)), len(data) - 1)] = int(rng.integers(256))
    path, label = put(box.folder / "a.jpg", bytes(data)), box.folder / "a.png"
    shape = (32, 24) if rng.random() < 0.5 else (24, 32)
    Image.fromarray(np.zeros(shape, np.uint8)).save(label)
    judge(lambda: files.load_pair(path, label, files.load_label), lambda pair: "")

    return judge(lambda: files.load_image(path),
                 lambda found: "payload" if found.size == 32 * 24 * 3 else "wrong")


# ------------------------------------------------------------------------------------------------
# Lists and JSON

def people_setup(folder: Path) -> Box:
    """A folder of people with its annotations and boxes."""
    make_people(folder)
    return Box(folder, {"coco": json.loads((folder / "annotations/val.json").read_text()),
                        "found": [detection(7, score=0.5), detection(9)],
                        "boxes": {"a.png": [[1, 2, 30, 40]], "b.png": [[5, 5, 20.5, 30]]}})


def sane(content: dict) -> bool:
    """Whether what `read_coco` gave is what it says: types, no absurd numbers."""
    numbers = [v for p in content["annotations"] for key in ("keypoints", "bbox") for v in p[key]]
    numbers += [p[key] for p in content["annotations"] for key in ("area", "iscrowd")]
    ids = [type(v) for i in content["images"] for v in (i["id"], i["width"], i["height"])]
    ids += [type(p[key]) for p in content["annotations"] for key in ("id", "image_id")]
    return set(ids) <= {int} and all(
        type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e9 for v in numbers)


def coco_json(rng, box):
    """COCO annotations."""
    text, what, _ = mutate(box.good["coco"], rng)
    path = put(box.folder / "annotations/val.json", text.encode("utf-8", "surrogatepass"))

    def load():
        opened = coco.PoseFolder(data=str(box.folder)).open(cut("val"))
        opened.check()
        return opened, [opened[0, i] for i in range(len(opened))]

    def verdict(found):
        if not found[1]:
            return "wrong"
        finite = all(torch.isfinite(s[key]).all() for s in found[1] for key in ("image", "target"))
        return "payload" if finite and sane(coco.read_coco(path)) else "wrong"

    return judge(lambda: commanded(load), verdict, what)


def boxes_json(rng, box):
    """Detections of eval.py --boxes, in both forms."""
    text, what, _ = mutate(box.good[str(rng.choice(["found", "boxes"]))], rng)
    path = put(box.folder / "found.json", text.encode("utf-8", "surrogatepass"))

    def load():
        opened = coco.PoseFolder(data=str(box.folder), boxes=str(path)).open(cut("val"))
        opened.check()
        return coco.read_boxes(path)

    def verdict(found):
        right = all(type(b["image"]) in (int, str) and len(b["bbox"]) == 4 and all(
            type(v) in (int, float) and abs(v) < 1e9 for v in (*b["bbox"], b["score"]))
            for b in found)
        return "payload" if right else "wrong"

    return judge(load, verdict, what)


def list_file(rng, box):
    """NYU's and KITTI's lists."""
    good = "/kitchen/rgb_1.jpg /kitchen/d_1.png 518.8\nhall/rgb_2.jpg hall/d_2.png 518.8\n" * 3
    raw = corrupt(good.encode() * int(rng.integers(1, 3)), rng)
    path = put(box.folder / "list.txt", raw)

    def verdict(pairs):
        lines = [line.split() for line in raw.removeprefix(b"\xef\xbb\xbf").decode().split("\n")]
        wanted = [words[:2] for words in lines if words and words[1:2] != ["None"]]
        found = [[str(p.relative_to(box.folder)) for p in pair] for pair in pairs]
        same = [[str(Path(w.lstrip("/"))) for w in words] for words in wanted]
        return "payload" if found == same else "wrong"

    return judge(lambda: nyu_kitti.read_list(str(path), box.folder, "--val-list"), verdict)


def class_names(rng, box):
    """classes.txt, with line ends of every kind."""
    ends = ["\n", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\t", "\ufeff", "\n\n"]
    text = "".join(name + str(rng.choice(ends)) for name in ("sky", "road", "car", "tree", "post"))
    raw = text.encode() if rng.random() < 0.7 else corrupt(text.encode(), rng)
    path = put(box.folder / "classes.txt", raw)

    def verdict(names):
        return "payload" if len(names) == len(raw.decode().rstrip().split("\n")) else "wrong"

    return judge(lambda: ade20k.read_names(path), verdict)


# ------------------------------------------------------------------------------------------------
# Command lines

def commanded(load):
    """What load() gives, run as a command is: SystemExit where the user is told something."""
    result = []
    run_command(lambda: result.append(load()))
    return result[0]


def whole_command(rng, box):
    """train.py --resume and eval.py as processes of their own, one file of the run broken."""
    run, root = box.folder / "run", Path(__file__).parents[1]
    shutil.rmtree(run)
    shutil.copytree(box.folder / "good", run)
    names = [p for p in sorted(run.rglob("*")) if p.suffix in (".json", ".safetensors", ".jsonl")]
    path = names[int(rng.integers(len(names)))]
    raw = path.read_bytes()
    text = mutate(json.loads(raw), rng)[0].encode() if path.suffix == ".json" else b""
    put(path, text or corrupt(raw, rng))
    words = [["train.py", "--resume"], ["eval.py", "--val-scenes", "1", "--checkpoint"],
             ["eval.py", "--protocol", "--checkpoint"]][int(rng.integers(3))]
    done = subprocess.run([sys.executable, root / words[0], *words[1:], run], capture_output=True,
                          text=True, errors="replace")
    last = (done.stderr.strip().splitlines() or [""])[-1]
    fine = done.returncode == 0 or done.returncode in (1, 2) and last.startswith("error: ") \
        and "Traceback" not in done.stderr
    verdict = "failed" if not fine else "clean" if done.returncode else "payload"
    return verdict, f"{words[0]}: {path.name}: exit {done.returncode} {last[-100:]}"


def whole_setup(folder: Path) -> Box:
    """A run, and a copy of it."""
    box = run_setup(folder)
    shutil.copytree(folder / "run", folder / "good")
    return box


WORDS = ["", "0", "-1", "-5", "1", "2", "3", "1.5", "1e30", "nan", "inf", "-inf", "1e-30", "none",
         "auto", "x", "True", "1e400", "9" * 5000, "99999999999999999999", "65536", "../x", "/",
         "/proc/x", "~", "a\nb", "\x1b[31m", "\udcff", "x" * 300, "cuda:99", "mps", "meta", "64",
         "128", "0x10", "1_000", " 2", "--", "-", "\u0663"]


def draw_words(row: Recipe, rng) -> tuple[list[str], str, tuple | None]:
    """(a flag with absurd words, its name, where its value lies)."""
    paths = flag_paths(row)
    names = [*sorted(paths), "resume", "task", "dataset", "surprise"]
    name = names[int(rng.integers(len(names)))]
    flag, count = "--" + name.replace("_", "-"), int(rng.choice([1, 1, 1, 1, 0, 2, 4]))
    words = [WORDS[int(i)] for i in rng.integers(len(WORDS), size=count)]
    return ([f"{flag}={words[0]}"] if count == 1 and rng.random() < 0.5 else [flag, *words],
            name, paths.get(name))


def cheap(recipe: Recipe) -> bool:
    """Whether a step of this recipe is done in a second or two."""
    limits = {"iterations": 3, "batch": 8, "crop": 128, "crop_width": 128, "workers": 0,
              "val_scenes": 4, "num_prompts": 64, "refine_steps": 4, "channels": 64, "layers": 2,
              "head_channels": 64, "context_dim": 64, "latent_channels": 64, "scale": 256,
              "deconv_channels": 64, "resize_scale": 2, "window": 256, "sigma": 8, "at_once": 64}
    return all(limits.get(path[-1]) is None or not value
               or max(np.atleast_1d(value)) <= limits[path[-1]]
               for path, value in leaves(recipe).items())


def train_flags(rng, box):
    """Every flag of train.py, for every row; what is accepted on embedded scenes trains a step."""
    task, dataset = list(RECIPES)[int(rng.integers(len(RECIPES)))]
    if rng.random() < 0.6:
        dataset = "shapes"
    row, words = RECIPES[task, dataset], ["--task", task, "--dataset", dataset]
    extra, name, path = draw_words(row, rng)
    if dataset == "shapes":
        own = HEAD if task != "pose" else ["--sigma", "2", "--deconv-channels", "8"]
        words += [*TINY, *own, *SCENES, "--iterations", "1", "--out", str(box.folder / "run")]
    before = resolve(words)[0]

    def load():
        made, resumed = resolve([*words, *extra])
        if rng.random() < 0.2 and dataset == "shapes" and cheap(made) \
                and made.out == str(box.folder / "run"):
            train.train(made, False)
        return made, resumed

    def verdict(found):
        made, resumed = found
        value = leaves(made).get(path) if path else None
        ignored = path and value == leaves(before)[path] and name not in ("out", "max_side") \
            and extra[-1].rpartition("=")[2] not in (str(value), "none", "") \
            and "no" not in extra[0] and not isinstance(value, (bool, float, int, tuple))
        return "wrong" if resumed or ignored or not typed(object, made) else "payload"

    found = judge(lambda: commanded(load), verdict)
    return found[0], f"{found[1]} {' '.join(extra)[:80]!r} {task} {dataset}"


def eval_setup(folder: Path) -> Box:
    """A run of each task."""
    for task in ("seg", "depth", "pose"):
        write_run(task, folder / task)
    Image.new("RGB", (70, 64)).save(folder / "a.png")
    return Box(folder, {})


def eval_flags(rng, box):
    """Every flag of eval.py; what is accepted is run on one picture or two scenes."""
    task, own = str(rng.choice(["seg", "depth", "pose"])), evaluation.COMMANDS
    names = sorted({n for n, p in flag_paths(RECIPES[task, "shapes"]).items()
                    if p[0] in ("files", "protocol")} | set(own) - {"say_protocol"})
    name = names[int(rng.integers(len(names)))]
    words = [WORDS[int(i)] for i in rng.integers(len(WORDS), size=int(rng.choice([1, 1, 0, 2])))]
    arguments = ["--checkpoint", str(box.folder / task), "--out", str(box.folder / "out")]
    if rng.random() < 0.5:
        arguments += ["--image", str(box.folder / "a.png")]
    arguments += ["--" + name.replace("_", "-"), *words]

    def load():
        args, recipe, _, _ = evaluation.load(arguments)
        sys.argv = ["eval.py", *arguments]
        if rng.random() < 0.4 and cheap(recipe) and 0 <= args.workers <= 1:
            evaluation.main()
        return recipe

    found = judge(lambda: commanded(load),
                  lambda made: "payload" if typed(object, made) else "wrong")
    return found[0], f"{found[1]} {' '.join(arguments[-4:])[:120]!r}"
