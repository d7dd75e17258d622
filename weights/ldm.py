"""LDM names (CompVis's code, and the authors' checkpoints) -> Hugging Face names, by two tables.

    input_blocks.4.0.in_layers.0.weight  ->  down_blocks.1.resnets.0.norm1.weight

The second table is of the modules' places in the UNet or VAE encoder, the first of the names inside
a module.  Older Hugging Face files spell the VAE's attention in a third way.
"""
from torch import Tensor

LDM_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    "nin_shortcut": "conv_shortcut",
}
LDM_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
                     "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
VAE_ATTENTION = "encoder.mid_block.attentions.0."


def ldm_unet_table() -> dict[str, str]:
    """LDM module name -> Hugging Face module name, for the UNet of Stable Diffusion 1.x."""
    table = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    for n in range(1, 12):  # 1..11: two layers and a downsampler per level
        level, layer = divmod(n - 1, 3)
        if layer == 2:
            table[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            continue
        table[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{layer}"
        if level < 3:
            table[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{layer}"
    for n in range(12):  # three layers per level, the third one followed by an upsampler
        level, layer = divmod(n, 3)
        table[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{layer}"
        if level > 0:
            table[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if layer == 2 and level < 3:  # LDM counts the modules of a block: no attention at level 0
            slot = 2 if level > 0 else 1
            table[f"output_blocks.{n}.{slot}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def ldm_vae_table() -> dict[str, str]:
    """LDM module name -> Hugging Face module name, for the VAE encoder."""
    table = {
        "encoder.conv_in": "encoder.conv_in", "encoder.conv_out": "encoder.conv_out",
        "encoder.norm_out": "encoder.conv_norm_out", "quant_conv": "quant_conv",
        "encoder.mid.block_1": "encoder.mid_block.resnets.0",
        "encoder.mid.block_2": "encoder.mid_block.resnets.1",
        "encoder.mid.attn_1": "encoder.mid_block.attentions.0",
    }
    for level in range(4):
        for layer in range(2):
            name = f"encoder.down_blocks.{level}.resnets.{layer}"
            table[f"encoder.down.{level}.block.{layer}"] = name
        name = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        table[f"encoder.down.{level}.downsample.conv"] = name
    return table


LDM_MODULES = {"unet": ldm_unet_table(), "vae": ldm_vae_table()}


def hf_name(name: str, part: str) -> str | None:
    """Hugging Face name of one LDM tensor of `part` ("unet" or "vae"); None if it has none."""
    words, table = name.split("."), LDM_MODULES[part]
    for depth in (5, 4, 3, 2, 1):  # the longest module name that the table knows
        module = table.get(".".join(words[:depth]))
        if module is not None:
            inner = LDM_VAE_ATTENTION if module + "." == VAE_ATTENTION else LDM_RESNET
            leaf, _, kind = ".".join(words[depth:]).rpartition(".")
            return ".".join(filter(None, (module, inner.get(leaf, leaf), kind)))
    return None


def modern_vae_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the pre-2023 spelling of the VAE's attention (the published SD1.5 file has it).

    LDM stores these four matrices as 1x1 convolutions (C, C, 1, 1); ours and HF's are (C, C).
    """
    modern = {}
    for name, tensor in tensors.items():
        if name.startswith(VAE_ATTENTION):
            leaf, _, kind = name.removeprefix(VAE_ATTENTION).rpartition(".")
            name = f"{VAE_ATTENTION}{OLD_VAE_ATTENTION.get(leaf, leaf)}.{kind}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        modern[name] = tensor
    return modern
