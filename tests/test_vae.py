"""The VAE encoder is Stable Diffusion's: it equals diffusers' posterior mean, under HF's names.

    pytest tests/test_vae.py             (with -m slow: at SD1.5's full width)
"""
import json
from copy import deepcopy

import pytest
import torch
from ldm_names import to_ldm
from oracles import LEVELS, ROUNDING, diffusers_vae, relative_error
from safetensors.torch import save_file

from ops.errors import InputError
from vae import VAEConfig, VAEEncoder

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def encoder_part(oracle):
    """The tensors of diffusers' autoencoder that belong to the encoder."""
    return {k: v for k, v in oracle.state_dict().items()
            if not k.startswith(("decoder.", "post_quant_conv."))}


@pytest.fixture(scope="module")
def pair():
    """(diffusers' AutoencoderKL, our encoder) with the same random weights."""
    oracle = diffusers_vae()
    ours = VAEEncoder(VAEConfig(LEVELS)).eval()
    ours.load_state_dict(encoder_part(oracle))
    return oracle, ours


def test_names_are_hugging_faces(pair):
    """Names and shapes are diffusers' encoder's and quant_conv's; SD1.5 has 34.16 M of them."""
    oracle, ours = pair
    assert {k: v.shape for k, v in ours.state_dict().items()} == \
        {k: v.shape for k, v in encoder_part(oracle).items()}
    with torch.device("meta"):
        full = VAEEncoder()
    assert len(full.state_dict()) == 108
    assert sum(p.numel() for p in full.parameters()) == 34_163_664


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (70, 107), (33, 200)])
def test_equals_the_posterior_mean(pair, size):
    """Latents equal diffusers' posterior mean, unscaled, at any size."""
    oracle, ours = (deepcopy(module).double() for module in pair)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = oracle.encode(images).latent_dist.mean
        assert relative_error(ours(images), expected) < ROUNDING
    assert expected.shape[-2:] == (size[0] // 8, size[1] // 8)


def test_one_layer_per_level_equals_diffusers():
    """A shallower encoder, one residual block per level, equals diffusers', too."""
    oracle = diffusers_vae(layers=1)
    ours = VAEEncoder(VAEConfig(LEVELS, layers=1)).eval()
    ours.load_state_dict(encoder_part(oracle))
    oracle, ours, images = oracle.double(), ours.double(), torch.rand(2, 3, 64, 40).double() * 2 - 1
    with torch.no_grad():
        assert relative_error(ours(images), oracle.encode(images).latent_dist.mean) < ROUNDING


@pytest.mark.parametrize("groups,latents,layers", [(8, 8, 1), (16, 4, 2), (8, 3, 3)])
def test_other_sizes_are_read_from_the_folder(tmp_path, groups, latents, layers):
    """Norm groups, latent channels and layers of a small model are the folder's; latents equal."""
    oracle = diffusers_vae((32, 64, 96, 96), layers, groups, latents)
    oracle.save_pretrained(tmp_path / "vae")
    ours, oracle = VAEEncoder.from_pretrained(str(tmp_path)).double(), oracle.double()
    assert ours.config == VAEConfig((32, 64, 96, 96), layers, latents, groups)
    images = torch.rand(2, 3, 64, 40).double() * 2 - 1
    with torch.no_grad():
        assert relative_error(ours(images), oracle.encode(images).latent_dist.mean) < ROUNDING


@pytest.mark.parametrize("key,value", [
    ("norm_num_groups", 5), ("norm_num_groups", "32"), ("latent_channels", 8), ("in_channels", 4),
    ("block_out_channels", [32, 64, 96, 96]), ("layers_per_block", 1), ("act_fn", "gelu")])
def test_refuses_a_config_that_does_not_fit(tmp_path, key, value):
    """A config.json that its tensors contradict, or of another model, is refused by the field."""
    diffusers_vae().save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=f"config.json: {key}"):
        VAEEncoder.from_pretrained(str(tmp_path))


def test_gradients_equal_diffusers(pair):
    """Gradients of the image and the first and last convolution equal diffusers'."""
    oracle, ours = (deepcopy(module).double() for module in pair)
    images = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)).double()
    grads = []
    for module, encode in ((oracle, lambda x: oracle.encode(x).latent_dist.mean), (ours, ours)):
        x = images.clone().requires_grad_()
        encode(x).square().sum().backward()
        grads.append((x.grad, module.encoder.conv_in.weight.grad, module.quant_conv.weight.grad))
    for expected, found in zip(*grads):
        assert relative_error(found, expected) < ROUNDING


def test_downsampling_pads_right_and_bottom_only(pair):
    """A change of the first pixel row reaches the first latent row through (0, 1, 0, 1) padding."""
    _, ours = pair
    down = deepcopy(ours.encoder.down_blocks[0].downsamplers[0]).double()
    x = torch.zeros(1, LEVELS[0], 8, 8, dtype=torch.float64)
    x[:, :, 0, 0] = 1.0
    with torch.no_grad():
        moved = down(x) - down(torch.zeros_like(x))
        expected = down.conv.weight[:, :, 0, 0].sum(dim=1)  # the kernel's first tap, not its centre
    assert relative_error(moved[0, :, 0, 0], expected) < ROUNDING


@pytest.mark.parametrize("layout", ["new", "old", "ldm"])
def test_every_spelling_of_the_attention_loads(pair, tmp_path, layout):
    """New HF names, the pre-2023 names and LDM's 1x1 convolutions all give the same encoder."""
    oracle, ours = pair
    oracle.save_pretrained(tmp_path / "vae")
    tensors = dict(oracle.state_dict())
    if layout != "new":
        renamed = {}
        for name, value in tensors.items():
            if layout == "ldm":
                if name.startswith(("encoder", "quant")):
                    if "mid_block.attentions" in name and value.ndim == 2:
                        value = value[:, :, None, None]
                    name = to_ldm(name, "vae")
                name = "first_stage_model." + name
            elif "encoder.mid_block.attentions" in name:
                for new, old in OLD_NAMES.items():
                    name = name.replace(f".{new}.", f".{old}.")
            renamed[name] = value.contiguous()
        tensors = renamed
    source = tmp_path
    if layout == "ldm":
        source = tmp_path / "single.safetensors"
        save_file({**tensors, "model_ema.decay": torch.zeros(1)}, source)
    else:
        save_file(tensors, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    loaded = VAEEncoder.from_pretrained(str(source))
    assert loaded.config == VAEConfig(LEVELS)
    for name, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.slow
def test_full_width_equals_diffusers(tmp_path):
    """At SD1.5's width, through the files that diffusers saves and through LDM's naming."""
    oracle = diffusers_vae((128, 256, 512, 512))
    oracle.save_pretrained(tmp_path / "vae")
    tensors = {"first_stage_model." + to_ldm(k, "vae"): v for k, v in encoder_part(oracle).items()}
    save_file(tensors, tmp_path / "single.safetensors")
    images = torch.rand(1, 3, 136, 200) * 2 - 1
    with torch.no_grad():
        expected = oracle.encode(images).latent_dist.mean
        for source in (tmp_path, tmp_path / "single.safetensors"):
            error = relative_error(VAEEncoder.from_pretrained(str(source))(images), expected)
            print(f"\n{source.name}: relative error {error:.1e}")
            assert error < 1e-5
