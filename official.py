"""Names of the authors' released checkpoints (fudan-zvg/meta-prompts) -> names of this project."""
import re

from weights import hf_name

PREFIXES = {"upconv1.": "neck.0.", "upconv2.": "neck.1.", "upconv3.": "neck.2.",
            "upconv4.": "neck.3.", "decode_head.": "head.decode_head.",
            "auxiliary_head.": "head.auxiliary_head."}


def our_name(name: str) -> str | None:
    """Our name of an official tensor; "prompts" / "temb" + " ROW" for a row of a stacked one.

    `cross_unet_conv2` and 3 are further names of the UNet's own output layers.  None: not ours.
    """
    if match := re.fullmatch(r"t(\d)", name):
        return f"temb {int(match[1]) - 1}"
    if match := re.fullmatch(r"meta_prompts(\d?)", name):
        return f"prompts {int(match[1] or 1) - 1}"
    if match := re.match(r"cross_unet_conv\d\.(.*)", name):
        name = f"unet.unet.diffusion_model.out.{match[1]}"
    for prefix, part in (("unet.unet.diffusion_model.", "unet"), ("encoder_vq.", "vae")):
        if name.startswith(prefix):
            renamed = hf_name(name.removeprefix(prefix), part)
            return renamed and f"{part}.{renamed}"
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None
