"""Write a pretrained model as a folder that diffusers' StableDiffusionPipeline reads.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/  README.md

Tensors are float16 under the plain file names; both diffusers and weights/files.py widen them.
"""
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from ops.errors import InputError
from pretraining.settings import FIXED
from vpd.text import Tokenizer
from weights.checkpoint import remove, write_json

SCHEDULER = {  # Stable Diffusion's, for the DDIM sampler
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
    "feature_extractor": [None, None], "image_encoder": [None, None],
    "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}
PARTS = ("README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
CARD = """---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sd: a Stable Diffusion of {millions:.1f} million parameters

A latent diffusion model in Stable Diffusion 1.x's layout: KL autoencoder, text encoder, UNet.
It was pretrained for tests of perception with diffusion models, not to make pictures for anybody.

* **Data**: {scenes:,} embedded scenes of {size} x {size} pixels (sets/shapes.py), rendered, no
  photographs; {captions} captions of each, made from what the renderer knows (sets/captions.py).
  Captions are weak labels.  Scene seeds lie outside those of the tasks' training and validation.
* **Autoencoder**: {psnr:.1f} dB PSNR on held-out scenes; {latent_channels} latent channels at 1/8,
  each with mean 0 and standard deviation 1, so `scaling_factor` is 1.
* **Diffusion**: {images:,} images seen in {steps:,} steps of {batch}, {hours:.1f} hours of one core
  of a shared CPU; averaged weights.  Held-out loss {held_out:.4f}; by quarter of t: {quarters};
  with other scenes' captions {wrong_captions:.4f}.{start}
* **Seed**: {seed}.  **Licence**: MIT.

Made by `python -m tools.pretrain {command}`, with
```json
{settings}
```
"""


START = """
* **Started from** {start} and its autoencoder, in place of random weights: {before:,} images seen
  there, in addition to the above."""
PLACES = ("out", "start", "export")  # of the settings: paths of the machine


def unet_config(settings: dict) -> dict:
    """config.json of unet/, in diffusers' words."""
    return {"_class_name": "UNet2DConditionModel", "sample_size": settings["size"] // 8,
            "in_channels": settings["latent_channels"], "out_channels": settings["latent_channels"],
            "block_out_channels": settings["unet_channels"], "layers_per_block": settings["layers"],
            "attention_head_dim": settings["heads"], "cross_attention_dim": settings["width"],
            "norm_num_groups": settings["groups"], "norm_eps": 1e-5, "act_fn": "silu",
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False}


def vae_config(settings: dict) -> dict:
    """config.json of vae/."""
    return {"_class_name": "AutoencoderKL", "sample_size": settings["size"],
            "in_channels": 3, "out_channels": 3, "scaling_factor": 1.0,
            "latent_channels": settings["latent_channels"],
            "block_out_channels": settings["vae_channels"], "layers_per_block": settings["layers"],
            "norm_num_groups": settings["groups"], "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4}


def text_config(encoder, tokenizer: Tokenizer) -> dict:
    """config.json of text_encoder/, in transformers' words; 5 and 4 ask for the type differently.

    Without it transformers computes in the file's float16, while diffusers widens UNet and VAE.
    """
    return {**vars(encoder.config), "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0, "dtype": "float32", "torch_dtype": "float32",
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}


def write_card(path: Path, settings: dict, parameters: int, vae: dict, lines: list[dict]) -> None:
    """README.md: data, compute, figures, seed, command; what is the machine's own is left out.

    vae, lines: of metrics.jsonl, the last one of the autoencoder and those of `diffusion`.
    """
    lines = list({line["step"]: line for line in lines
                  if line["step"] <= lines[-1]["step"]}.values())  # of a run begun again, the last
    last = {**lines[-1], "steps": lines[-1]["step"], "psnr": vae["psnr"],
            "hours": sum(line["seconds"] for line in lines) / 3600,
            "quarters": ", ".join(f"{value:.3f}" for value in lines[-1]["quarters"])}
    names = ("seed", "size", "captions", "batch", "latent_channels")
    figures = ("scenes", "psnr", "images", "steps", "hours", "held_out", "quarters",
               "wrong_captions")
    card = CARD.format(**{name: settings[name] for name in names},
                       **{name: last[name] for name in figures}, millions=parameters / 1e6,
                       start=START.format(**vae) if "start" in vae else "",
                       command="diffusion --start FOLDER" if "start" in vae else
                       "autoencoder`, then `diffusion",
                       settings=json.dumps({name: value for name, value in settings.items()
                                            if name not in PLACES}, indent=2))
    path.write_text(card, encoding="utf-8")


def check_place(folder: Path, settings: dict) -> None:
    """InputError if what lies where a model is to be exported is more than an exported model, or
    one of other FIXED settings, by its card.
    """
    if not folder.exists():
        return
    if not (folder / "model_index.json").is_file():
        raise InputError(f"--export {folder} is there and no exported model: it is not replaced")
    for path in sorted(folder.iterdir()):
        if path.name not in PARTS:
            raise InputError(f"--export {folder} would be replaced, and {path} lost: move it away")
    theirs, ours = card_settings(folder / "README.md"), json.loads(json.dumps(settings))
    for name in FIXED:
        if name not in PLACES and theirs.get(name) != ours[name]:
            raise InputError(f"--export {folder} is a model whose card has {name} "
                             f"{theirs.get(name)}, of this run {ours[name]}: it is not replaced; "
                             "move it away, or give another folder")


def card_settings(path: Path) -> dict:
    """The settings in a card, as `write_card` leaves them; none if it is another one's."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        found = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    except (RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def export(folder: Path, settings: dict, unet: nn.Module, vae: nn.Module, text_encoder: nn.Module,
           tokenizer: Path, vae_line: dict, lines: list[dict]) -> None:
    """Write the whole folder beside its place, then put it there.

    settings: of tools/pretrain.py; tokenizer: a folder with vocab.json and merges.txt; vae_line,
    lines: see `write_card`.
    """
    new, old = (folder.with_name(folder.name + end) for end in (".export-new", ".export-old"))
    check_place(folder, settings)
    remove(new)
    words = Tokenizer.from_pretrained(str(tokenizer.parent))
    for part in ("scheduler", "unet", "vae", "text_encoder"):
        (new / part).mkdir(parents=True)
    shutil.copytree(tokenizer, new / "tokenizer")
    write_json(new / "model_index.json", INDEX)
    write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(new / "unet" / "config.json", unet_config(settings))
    write_json(new / "vae" / "config.json", vae_config(settings))
    write_json(new / "text_encoder" / "config.json", text_config(text_encoder, words))
    parameters = 0
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        tensors = {name: t.half().contiguous() for name, t in module.state_dict().items()}
        parameters += sum(t.numel() for t in tensors.values())
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, new / part / f"{name}.safetensors", {"format": "pt"})
    write_card(new / "README.md", settings, parameters, vae_line, lines)
    remove(old)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    remove(old)
