"""A trained model as one file that torch runs without this code: torch.export.

    python -m tools.export RUN out.pt2

Then, anywhere:

    program = torch.export.load("out.pt2").module()
    answer = program(images)                             # (B, 3, H, W) RGB in [0, 1], float32
    answer = program(images, text=states)                # VPD's refer: a text encoder's states

What the model's forward gives: logits, metres or heatmaps, before any window, scale or mirror image
of the protocol.  Any number of images, of any size within what is printed.  Weights are float32.
Before the file gets its name it is loaded, and its answers are compared with the model's.
"""

import torch
from torch import Tensor, nn
from torch.export import Dim

import eval as evaluation
from ops.errors import InputError, run_command
from tasks import methods
from tasks.common import SMALLEST
from tasks.flags import Parser
from weights.checkpoint import own_memory

ROUNDING = 1e-5  # of the largest value of an answer: more is another answer


def main() -> None:
    """Load, export, compare, write."""
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of train.py, or a saved model")
    parser.add_argument("out", metavar="FILE", help="the .pt2 file to write")
    args = parser.parse_args()
    out = evaluation.check_new_file("FILE", args.out, ".pt2")
    source = evaluation.find_checkpoint(args.run, "RUN")
    model = own_memory(methods.load(source)).requires_grad_(False)
    step = side_step(model.config)
    print(f"model      {source}: {model.config.task}, {methods.method_of(model.config)}\n"
          f"sides      multiples of {step}, {least_side(step)} or more; any number of images",
          flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(out.name.removesuffix(".pt2") + ".tmp.pt2")
    try:
        torch.export.save(exported(model, step), new)
        compare(torch.export.load(new).module(), model, step)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    text = ", text=states" if model.config.task == "refer" else ""
    print(f"wrote {out}: torch.export.load({str(out)!r}).module()(images{text})")


def side_step(config) -> int:
    """What the sides of an exported model's images are multiples of: 64, the UNet's coarsest
    stride; 8, the encoder's, where the model enlarges its images to multiples of 64 (depth).
    """
    return 8 if getattr(config, "resize_scale", 0) > 0 else 64


def least_side(step: int) -> int:
    """The least side of an exported model's images: 128, or 64 where they are enlarged.  To
    torch.export a coarsest map of one row is a case of its own.
    """
    return SMALLEST if step < SMALLEST else 2 * SMALLEST


def inputs(config, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Random inputs of a model, by name."""
    made = {"images": torch.rand(batch, 3, height, width)}
    if config.task == "refer":
        made["text"] = torch.randn(batch, config.num_tokens, config.unet.context_dim)
    return made


@torch.no_grad()
def exported(model: nn.Module, step: int) -> torch.export.ExportedProgram:
    """The model as a program for any number of images, whose sides are multiples of `step`."""
    batch, least = Dim("batch", min=1), least_side(step) // step
    shapes = {"images": {0: batch, 2: step * Dim("height", min=least),
                         3: step * Dim("width", min=least)}}
    example = inputs(model.config, 2, 128, 192)
    if "text" in example:
        shapes["text"] = {0: batch}
    return torch.export.export(model, (example.pop("images"),), example, dynamic_shapes=shapes,
                               strict=False)


@torch.no_grad()
def compare(program, model: nn.Module, step: int) -> None:
    """Print the largest differences between the answers of both, in batches and sizes other than
    those of the export; InputError if they are more than rounding.
    """
    for batch, height, width in ((1, 192, 128), (3, 192 + step, least_side(step))):
        given = inputs(model.config, batch, height, width)
        images = given.pop("images")
        answer, expected = program(images, **given), model(images, **given)
        if answer.shape != expected.shape:
            raise InputError(f"the exported program answers {tuple(answer.shape)}, the model "
                             f"{tuple(expected.shape)}: nothing is written")
        difference = (answer - expected).abs().max().item()
        print(f"compared   {batch} images, {width}x{height}: largest difference {difference:g} of "
              f"{expected.abs().max():.4g}", flush=True)
        if not difference <= ROUNDING * expected.abs().max().item():
            raise InputError(f"the exported program's answers differ by {difference:g}: nothing is "
                             "written")


if __name__ == "__main__":
    run_command(main)
