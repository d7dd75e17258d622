"""What the UNet's features look like: their first three principal components as red, green, blue.

    python -m tools.features --backbone tiny                         of a backbone, untrained
    python -m tools.features --checkpoint RUN --passes 1 3           of a run, after these passes
    python -m tools.features --backbone SOURCE --image FOLDER        on your own pictures

Writes one sheet: a row per picture, up to 8, and for each number of passes the features of strides
8, 16 and 32, one square per position.  Pictures are compared with each other: the components are
those of all pictures' features together, so that what has one colour is alike, within a column.

Without --image four embedded scenes are shown.  What a backbone alone has not learned is drawn at
random, as training would begin: the prompts; the time embedding is Stable Diffusion's of t = 0.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import eval as evaluation
from model import Config, MetaPromptModel
from ops import draw
from ops.device import device_of, pick_device, to_batch
from ops.errors import InputError, run_command
from sets.embedded import Scenes
from sets.files import Cut, load_image
from tasks import methods
from tasks.common import SMALLEST, bounded
from tasks.flags import Parser
from tools.heatmaps import readable

ROWS = 8  # pictures in a sheet
SCENES, SCENE_SIDE = 4, 256  # without --image
STRIDES = (8, 16, 32)  # of the features that are shown; of stride 64 there are few positions
CELL = 160  # longer side of a panel, pixels


def main() -> None:
    """Load, compute, draw."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", metavar="RUN", help="run folder of train.py, or a model")
    parser.add_argument("--backbone", metavar="SOURCE",
                        help="or a Stable Diffusion: hub id, folder, .safetensors; tiny: our own")
    parser.add_argument("--unet", metavar="SOURCE", help="the backbone's UNet, if elsewhere")
    parser.add_argument("--image", metavar="FILE|FOLDER", help="your own pictures")
    parser.add_argument("--passes", type=int, nargs="+", metavar="T",
                        help="the UNet's passes [the run's; of a backbone 1]")
    parser.add_argument("--max-side", type=int, default=512, help="of a picture, pixels [512]")
    parser.add_argument("--out", default="features.png", help="the file to write [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    out, device = check(args), pick_device(args.device)
    model, passes = load(args)
    names, pictures = scenes() if args.image is None else photos(args.image, out, args.max_side)
    features = [features_of(model.to(device).eval(), pictures, T) for T in passes]
    save(out, names, pictures, passes, features)
    print(f"wrote {out}: {len(pictures)} pictures, after {', '.join(map(str, passes))} passes")


def check(args) -> Path:
    """The file to write; InputError for flags that don't go together, or do nothing."""
    out = Path(args.out)
    if (args.checkpoint is None) == (args.backbone is None):
        raise InputError("give --checkpoint RUN or --backbone SOURCE")
    if args.unet and args.checkpoint:
        raise InputError("--unet would do nothing: a checkpoint has its own")
    if out.suffix != ".png":
        raise InputError(f"--out {out}: its name must end in .png")
    if out.exists():
        raise InputError(f"--out {out} exists: give another name, or remove it")
    if args.max_side < SMALLEST:
        raise InputError(f"--max-side {args.max_side}: {SMALLEST} pixels or more")
    if args.image is not None and not Path(args.image).expanduser().exists():
        raise InputError(f"--image {args.image} does not exist: an image file or a folder of them")
    if min(args.passes or [1]) < 1:
        raise InputError(f"--passes {min(args.passes)}: 1 or more")
    evaluation.check_folder("--out", str(out.parent))
    return out


def load(args) -> tuple:
    """(model, numbers of passes); InputError if the model has fewer, or needs a sentence."""
    if args.backbone:
        passes = args.passes or [1]
        torch.manual_seed(0)                             # of the prompts
        config = Config(refine_steps=max(passes), modulated_timestep=False,
                        head_channels=1)                 # the head is not asked
        return MetaPromptModel.from_stable_diffusion(config, args.backbone, args.unet), passes
    source = evaluation.find_checkpoint(args.checkpoint)
    model = methods.load(source)
    if model.config.task == "refer":
        raise InputError(f"{source} reads a sentence beside the image, it has no other features")
    most = getattr(model.config, "refine_steps", 1)      # VPD has one pass
    passes = args.passes or [most]
    if max(passes) > most:
        raise InputError(f"--passes {max(passes)}: {source} was trained with {most}")
    return model, passes


# ------------------------------------------------------------------------------------------------
# Pictures

def scenes() -> tuple[list[str], list[np.ndarray]]:
    """(names, pictures) of the first scenes that the embedded set validates on."""
    rendered = Scenes().open(Cut("val", (SCENE_SIDE, SCENE_SIDE), None, 0))
    pictures = [draw.to_uint8(rendered[0, i]["image"]) for i in range(SCENES)]
    return [f"scene {i}" for i in range(SCENES)], pictures


def photos(source: str, out: Path, max_side: int) -> tuple[list[str], list[np.ndarray]]:
    """(names, pictures (H, W, 3) uint8 at the size that the model gets) of a file or a folder, of
    many ROWS that are evenly spread; says which can't be read.
    """
    root, files = evaluation.find_images(source, out)
    count = min(ROWS, len(files))
    files = [files[len(files) * i // count] for i in range(count)]

    def picture(i: int) -> np.ndarray:
        """The i-th file as the model gets it; InputError if it can't be read."""
        return bounded(load_image(root / files[i]), max_side)

    good, skipped = readable(picture, count)
    for message in skipped:
        print(f"skipped    {message}")
    return [files[i].name for i in good], [picture(i) for i in good]


# ------------------------------------------------------------------------------------------------
# Features and their colours

@torch.inference_mode()
def features_of(model, pictures: list[np.ndarray], passes: int) -> list[list[Tensor]]:
    """Per picture its features of STRIDES after so many passes, (C_i, h_i, w_i) each."""
    trained = model.config
    if passes < getattr(trained, "refine_steps", 1):
        model.config = replace(trained, refine_steps=passes)  # the first ones, with their prompts
    found = [model.features(to_batch(picture, device_of(model)))[:len(STRIDES)]
             for picture in pictures]
    model.config = trained
    return [[f[0].cpu() for f in features] for features in found]


def components(maps: list[Tensor]) -> list[np.ndarray]:
    """The first three principal components of maps (C, h, w) of one C, over all their positions, as
    colours (h, w, 3) uint8: black and full are the 2nd and the 98th percentile.
    """
    points = torch.cat([m.flatten(1) for m in maps], dim=1).double().T     # (positions, C)
    points = points - points.mean(dim=0)
    _, axes = torch.linalg.eigh(points.T @ points)                         # ascending
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.sum(dim=0).sign()                                   # else either is right
    values = points @ axes
    low, high = (values.quantile(q, dim=0) for q in (0.02, 0.98))
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = (colours * 255).round().byte().split([m[0].numel() for m in maps])
    return [c.view(*m.shape[1:], 3).numpy() for c, m in zip(colours, maps)]


def save(out: Path, names: list[str], pictures: list[np.ndarray], passes: list[int],
         features: list[list[list[Tensor]]]) -> None:
    """Write the sheet; features[number of passes][picture][stride]."""
    columns = [(f"T = {T}, stride {stride}", components([of[i] for of in found]))
               for T, found in zip(passes, features) for i, stride in enumerate(STRIDES)]
    panels = []
    for row, (name, picture) in enumerate(zip(names, pictures)):
        factor = CELL / max(picture.shape[:2])
        height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
        panels.append((name, draw.fit(picture, height, width)))
        for title, maps in columns:
            squares = Image.fromarray(maps[row]).resize((width, height), Image.NEAREST)
            panels.append((title, np.asarray(squares)))
    draw.save_grid(out, panels, 1 + len(columns))


if __name__ == "__main__":
    run_command(main)
