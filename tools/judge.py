"""What the text does in a small Stable Diffusion of one's own: of N held-out captions, the share
whose classes a segmentation model finds in the sample.

    python -m tools.judge --checkpoint RUN
    python -m tools.judge --checkpoint RUN --backbone FOLDER --captions 50 --sample-steps 10

RUN is a segmentation run on the embedded scenes, FOLDER what tools/pretrain.py exported.  A class
is found if it covers `VISIBLE` of the pixels, the least that captions speak of; a caption, if every
class of objects that it names is.  Sky and ground are in nearly every scene and are not asked for.
The same is counted, beside each caption's own sample, in
    shuffled   the sample of another caption: own less shuffled is what the text does
    scene      the rendered scene that the caption is about: the most that the judge can find
Writes OUT/{captions.json, captions.png}.
"""
import re
from itertools import count
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from eval import check_folder, find_checkpoint
from ops import draw
from ops.errors import InputError, run_command
from ops.settings import checked
from pretraining.decoder import Autoencoder
from pretraining.diffusion import Denoiser, sample
from pretraining.settings import Settings
from pretraining.start import read_autoencoder
from sets.captions import PLURALS, VISIBLE, captions
from sets.embedded import Scenes
from sets.shapes import CLASSES, render_world
from tasks import methods, seg
from tasks.captioned import CaptionConfig
from tasks.flags import Parser
from tools.pretrain import HELD_OUT
from unet import UNet
from vpd.text import TextEncoder, Tokenizer
from weights.checkpoint import write_json
from weights.files import local

OBJECTS = CLASSES[2:]  # all but sky and ground
SIZE = Settings().size  # pixels; side of scenes and samples
AT_ONCE = 25  # pictures in a batch
DRAWN = 8  # rows of captions.png


def main() -> None:
    """Load, sample, segment, count."""
    parser, usual = Parser(__doc__), Settings()
    parser.add_argument("--checkpoint", required=True, metavar="RUN",
                        help="run folder of train.py --task seg, or a saved model: the judge")
    parser.add_argument("--backbone", default="tiny", metavar="FOLDER",
                        help="exported model that is judged [tiny: weights/tiny-sd]")
    parser.add_argument("--captions", type=int, default=200, metavar="N", help="how many [200]")
    parser.add_argument("--sample-steps", type=int, default=usual.sample_steps, metavar="X",
                        help="of DDIM [%(default)s]")
    parser.add_argument("--guidance", type=float, default=usual.guidance, metavar="X",
                        help="of samples: 1 is none [%(default)s]")
    parser.add_argument("--out", help="folder for the results; default: RUN/captions")
    args = parser.parse_args()
    checked(int, args.sample_steps, "--sample-steps", "sample_steps")
    checked(float, args.guidance, "--guidance", "guidance")
    if not 2 <= args.captions <= 10_000:
        raise InputError(f"--captions is {args.captions}, possible is 2 to 10000")
    out = Path(args.out or Path(args.checkpoint) / "captions")
    check_folder("--out", str(out))
    judge = load_judge(args.checkpoint)
    parts = load_backbone(str(local(args.backbone)))
    texts, scenes = held_out(args.captions)
    samples = draw_samples(*parts, texts, args.sample_steps, args.guidance)
    own, truth = segment(judge, samples), segment(judge, scenes)
    figures = shares(texts, {"own": own, "shuffled": own.roll(1, 0), "scene": truth})
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "captions.json", {**vars(args), "least_area": VISIBLE, **figures})
    save_sheet(out / "captions.png", texts, samples, own)
    report(figures)
    print(f"wrote {out}/: captions.json, captions.png")


# ------------------------------------------------------------------------------------------------
# Who is judged, by whom, on what

def load_judge(run: str) -> nn.Module:
    """The segmentation model of a run; InputError if it is none of the embedded scenes, or reads
    captions: it would find what it is told.
    """
    folder = find_checkpoint(run)
    model = methods.load(folder)
    if model.config.task != "seg" or model.config.class_names != CLASSES \
            or isinstance(model.config, CaptionConfig):
        raise InputError(f"--checkpoint {folder} is no model of --task seg --dataset shapes, or it "
                         "reads captions: it can't judge")
    return model


def load_backbone(folder: str) -> tuple[Denoiser, Autoencoder, Tokenizer]:
    """Denoiser, autoencoder and tokenizer of an exported folder; InputError if one is unusable."""
    vae = read_autoencoder(folder, "--backbone")
    model = Denoiser(UNet.from_pretrained(folder), TextEncoder.from_pretrained(folder))
    return model.eval(), vae.eval(), Tokenizer.from_pretrained(folder)


def held_out(number: int) -> tuple[list[str], Tensor]:
    """A caption of each of so many held-out scenes, which names an object; the scenes, (N, 3, H, W)
    in [0, 1].
    """
    texts, images = [], []
    for seed in count(HELD_OUT):
        scene, world = render_world(seed, SIZE, SIZE)
        text = captions(scene, world, seed)[0]
        if named(text):
            texts.append(text)
            images.append(scene.image)
        if len(texts) == number:
            return texts, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def named(text: str) -> set[str]:
    """The classes of objects in a caption."""
    words = set(re.findall(r"\w+", text))
    return {name for name in OBJECTS if words & {name, PLURALS.get(name, f"{name}s")}}


@torch.inference_mode()
def draw_samples(model: Denoiser, vae: Autoencoder, tokenizer: Tokenizer, texts: list[str],
                 steps: int, guidance: float) -> Tensor:
    """A picture of each text, (N, 3, H, W) in [0, 1], from one seed's noise."""
    draws, side = torch.Generator().manual_seed(0), SIZE // 8
    noise = torch.randn(len(texts), vae.config.latent_channels, side, side, generator=draws)
    pictures = []
    for part, ids in tqdm(zip(noise.split(AT_ONCE), tokenizer(texts).split(AT_ONCE)),
                          total=-(-len(texts) // AT_ONCE), desc="sample", unit="batch"):
        latents = sample(model, part, ids, tokenizer([""]), steps, guidance)
        pictures.append(vae.decode(latents) / 2 + 0.5)
    return torch.cat(pictures).clamp(0, 1)


def segment(judge: nn.Module, images: Tensor) -> Tensor:
    """Labels (N, H, W) of images (N, 3, H, W) in [0, 1]."""
    with torch.inference_mode():
        return torch.cat([judge(part).argmax(dim=1) for part in images.split(AT_ONCE)])


# ------------------------------------------------------------------------------------------------
# What is found

def shares(texts: list[str], labels: dict[str, Tensor]) -> dict:
    """For every kind of labels (N, H, W): the share of texts whose classes are all found in theirs;
    for every class, how many texts name it, and in how many of their pictures it is found.
    """
    asked = [named(text) for text in texts]
    result = {"shares": {}, "classes": {name: {"named": sum(name in a for a in asked)}
                                        for name in OBJECTS}}
    for kind, maps in labels.items():
        found = [seen(picture) for picture in maps]
        result["shares"][kind] = sum(a <= f for a, f in zip(asked, found)) / len(texts)
        for name in OBJECTS:
            result["classes"][name][kind] = sum(name in a & f for a, f in zip(asked, found))
    return result


def seen(labels: Tensor) -> set[str]:
    """The classes of objects that cover enough of a label map (H, W)."""
    counts = torch.bincount(labels.flatten(), minlength=len(CLASSES)).tolist()
    least = VISIBLE * labels.numel()
    return {name for name, pixels in zip(CLASSES, counts) if pixels >= least} & {*OBJECTS}


def report(figures: dict) -> None:
    """Print both."""
    kinds = list(figures["shares"])
    print(f"{'':10}  named  " + "  ".join(f"{kind:>8}" for kind in kinds))
    for name, row in figures["classes"].items():
        print(f"{name:10}  {row['named']:5}  " + "  ".join(f"{row[kind]:8}" for kind in kinds))
    print(f"{'all named':10}         "
          + "  ".join(f"{figures['shares'][kind]:8.3f}" for kind in kinds))


def save_sheet(path: Path, texts: list[str], samples: Tensor, labels: Tensor) -> None:
    """Write the first rows of samples (N, 3, H, W) and their labels (N, H, W), captions above."""
    classes = Scenes().classes()
    panels = []
    for text, image, found in list(zip(texts, samples, labels.numpy()))[:DRAWN]:
        pair = [draw.enlarge(draw.to_uint8(image)),
                draw.enlarge(seg.colour_labels(found, classes))]
        panels.append([draw.caption(np.concatenate(pair, axis=1), text)])
    draw.save_stack(path, panels, ("sample", "what the judge finds"),
                    lambda width: seg.legend([labels.numpy()], classes, width))


if __name__ == "__main__":
    run_command(main)
