"""HF -> LDM names, written the other way round than weights/ldm.py, as an independent check."""
import re

UNET_LEAF = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
             "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_LEAF = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                 "to_out.0": "proj_out"}


def leaf(name: str, table: dict[str, str]) -> str:
    """Replace the module name in front of .weight / .bias."""
    module, kind = name.rsplit(".", 1)
    return f"{table.get(module, module)}.{kind}"


def to_ldm(name: str, part: str) -> str:
    """LDM name of an HF tensor of "unet" or "vae"."""
    return unet_name(name) if part == "unet" else vae_name(name)


def unet_name(name: str) -> str:
    """LDM name of a UNet tensor, by regular expressions on the HF name."""
    if m := re.fullmatch(r"time_embedding\.linear_(\d)\.(.*)", name):
        return f"time_embed.{2 * int(m[1]) - 2}.{m[2]}"
    if m := re.fullmatch(r"conv_in\.(.*)", name):
        return f"input_blocks.0.0.{m[1]}"
    if m := re.fullmatch(r"conv_norm_out\.(.*)", name):
        return f"out.0.{m[1]}"
    if m := re.fullmatch(r"conv_out\.(.*)", name):
        return f"out.2.{m[1]}"
    if m := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * int(m[1]) + 3}.0.op.{m[2]}"
    if m := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
        level = int(m[1])
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.conv.{m[2]}"
    m = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d)\.)?(resnets|attentions)\.(\d)\.(.*)", name)
    side, level, kind, layer, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
    rest = leaf(rest, UNET_LEAF) if kind == "resnets" else rest
    slot = 0 if kind == "resnets" else 1
    if side == "mid":
        return f"middle_block.{1 if slot else 2 * layer}.{rest}"
    if side == "down":
        return f"input_blocks.{3 * level + layer + 1}.{slot}.{rest}"
    return f"output_blocks.{3 * level + layer}.{slot}.{rest}"


def vae_name(name: str) -> str:
    """LDM name of a VAE encoder tensor."""
    if m := re.fullmatch(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.(.*)", name):
        return f"encoder.down.{m[1]}.block.{m[2]}.{leaf(m[3], VAE_LEAF)}"
    if m := re.fullmatch(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"encoder.down.{m[1]}.downsample.conv.{m[2]}"
    if m := re.fullmatch(r"encoder\.mid_block\.resnets\.(\d)\.(.*)", name):
        return f"encoder.mid.block_{int(m[1]) + 1}.{leaf(m[2], VAE_LEAF)}"
    if m := re.fullmatch(r"encoder\.mid_block\.attentions\.0\.(.*)", name):
        return f"encoder.mid.attn_1.{leaf(m[1], VAE_ATTENTION)}"
    return name.replace("conv_norm_out", "norm_out")
