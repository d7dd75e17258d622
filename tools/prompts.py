"""Text embeddings of names, for --prompts and for VPD: one row per line of a file.

    python -m tools.prompts --classes FILE --backbone SOURCE --out prompts.safetensors
    python -m tools.prompts --classes FILE --backbone SOURCE --out prompts.safetensors --average

SOURCE has a text encoder: Stable Diffusion (hub id, folder, single file), or CLIP's own repository,
openai/clip-vit-large-patch14.  A name becomes "a photo of a NAME"; with --average it is put into
CLIP's 80 sentences for ImageNet, whose embeddings are averaged.  What is written is what VPD's
class_embeddings are: pooled states at the end token, not normalised, one tensor (N, D).
"""
from pathlib import Path

import torch
from safetensors.torch import save_file

import eval as evaluation
from ops.errors import run_command
from sets.ade20k import read_names
from tasks.flags import Parser
from vpd.prompts import IMAGENET, ONE, embed_names
from weights.files import SD15

TENSOR = "class_embeddings"  # its name in the file; train.py takes any


def main() -> None:
    """Read the names, embed them, write the file."""
    parser = Parser(__doc__)
    parser.add_argument("--classes", required=True, metavar="FILE",
                        help="one name per line, UTF-8, as classes.txt of a folder of your own")
    parser.add_argument("--backbone", default=SD15, metavar="SOURCE",
                        help="whose text encoder; default: %(default)s")
    parser.add_argument("--out", required=True, help="the .safetensors file to write")
    parser.add_argument("--average", action="store_true",
                        help="average CLIP's 80 sentences instead of one")
    args = parser.parse_args()
    out = evaluation.check_new_file("--out", args.out, ".safetensors")
    names = read_names(Path(args.classes))
    rows = embed_names(names, IMAGENET if args.average else ONE, args.backbone)
    write(out, rows)
    norms = rows.norm(dim=1)
    print(f"wrote {out}: {len(rows)} names, {rows.shape[1]} wide, norms {norms.min():.1f} to "
          f"{norms.max():.1f}")


def write(path: Path, rows: torch.Tensor) -> None:
    """Write the rows; a program that is killed leaves no half file under this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    save_file({TENSOR: rows.contiguous()}, new)
    new.replace(path)


if __name__ == "__main__":
    run_command(main)
