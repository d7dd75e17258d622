"""LDM names translate to Hugging Face's, one to one, and nothing is guessed.

    pytest tests/test_ldm.py
"""
import pytest
import torch
from ldm_names import to_ldm

from unet import UNet
from vae import VAEEncoder
from weights.ldm import hf_name


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_ldm_names_map_one_to_one(part):
    """The LDM table covers every tensor of SD1.5, and no two names meet."""
    with torch.device("meta"):
        names = list((UNet() if part == "unet" else VAEEncoder()).state_dict())
    ldm = [to_ldm(name, part) for name in names]
    assert len(set(ldm)) == len(names)
    assert [hf_name(name, part) for name in ldm] == names


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "input_blocks.99.0.bias", "foo", "a.b"])
def test_unknown_ldm_names_have_no_translation(name):
    """A name outside the table gives None, never a guess."""
    assert hf_name(name, "unet") is None
