"""The UNet is Stable Diffusion's: it equals diffusers, outputs and gradients, under HF's names.

    pytest tests/test_unet.py            (with -m slow: at SD1.5's full width)
"""
import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from oracles import (LEVELS, ROUNDING, diffusers_unet, hooked_features, mapped_features,
                     relative_error)

import unet as our
from ops.errors import InputError
from unet import UNet, UNetConfig

CONTEXT = 48


@pytest.fixture(scope="module")
def pair():
    """(diffusers' UNet, ours) with the same random weights, in float64."""
    oracle = diffusers_unet(context_dim=CONTEXT)
    ours = UNet(UNetConfig(LEVELS, context_dim=CONTEXT)).eval()
    ours.load_state_dict(oracle.state_dict())
    return oracle.double(), ours.double()


def inputs(size, N=77, B=2, seed=0):
    """Latents, timesteps and context of the given sizes."""
    torch.manual_seed(seed)
    latents, context = torch.randn(B, 4, *size).double(), torch.randn(B, N, CONTEXT).double()
    return latents, torch.tensor([7, 801])[:B], context


def test_names_are_hugging_faces(pair):
    """Names and shapes of all parameters are diffusers', so its files load with no remapping."""
    oracle, ours = pair
    assert {k: v.shape for k, v in ours.state_dict().items()} == \
        {k: v.shape for k, v in oracle.state_dict().items()}


def test_full_width_is_sd15():
    """The default sizes give SD1.5's 686 tensors and 859.52 million parameters."""
    with torch.device("meta"):
        unet = UNet()
    assert len(unet.state_dict()) == 686
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def assert_equal(oracle, ours, size, N):
    """Output and features are the oracle's."""
    latents, t, context = inputs(size, N)
    with torch.no_grad():
        output, expected = hooked_features(oracle, latents, t, context)
        features = ours(latents, ours.embed_timestep(t), context)
        assert relative_error(ours.to_latents(features[0]), output) < ROUNDING
    for i in range(4):
        assert relative_error(features[i], expected[i]) < ROUNDING


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (40, 16)])
@pytest.mark.parametrize("N", [1, 50, 150])
def test_equals_diffusers(pair, size, N):
    """Output and all four features equal diffusers', also non-square."""
    assert_equal(*pair, size, N)


def test_a_distilled_unet_equals_diffusers(tmp_path):
    """With one layer per block, as in BK-SDM-Base, the file tells, and all features are equal."""
    oracle = diffusers_unet(context_dim=CONTEXT, layers=1)
    oracle.save_pretrained(tmp_path / "unet")
    ours = UNet.from_pretrained(str(tmp_path)).eval()
    assert_equal(oracle.double(), ours.double(), (16, 24), N=50)


@pytest.mark.parametrize("groups,latents,layers", [(8, 8, 1), (16, 4, 2), (8, 3, 3)])
def test_other_sizes_are_read_from_the_folder(tmp_path, groups, latents, layers):
    """Norm groups, latent channels and layers of a small model are the folder's; outputs equal."""
    channels = (32, 64, 96, 96)
    oracle = diffusers_unet(channels, 4, CONTEXT, layers, groups, latents)
    oracle.save_pretrained(tmp_path / "unet")
    ours, oracle = UNet.from_pretrained(str(tmp_path)).eval().double(), oracle.double()
    assert ours.config == UNetConfig(channels, layers, 4, CONTEXT, latents, groups)
    _, t, context = inputs((8, 16), N=5)
    latents = torch.randn(2, latents, 8, 16).double()
    with torch.no_grad():
        output, expected = hooked_features(oracle, latents, t, context)
        features = ours(latents, ours.embed_timestep(t), context)
        assert relative_error(ours.to_latents(features[0]), output) < ROUNDING
    assert all(relative_error(a, b) < ROUNDING for a, b in zip(features, expected))


def test_features_have_the_papers_sizes(pair):
    """Finest first: C0..C3 channels at 1, 1/2, 1/4, 1/8 of the latents."""
    _, ours = pair
    latents, t, context = inputs((16, 24))
    features = ours(latents, ours.embed_timestep(t), context)
    assert [tuple(f.shape[1:]) for f in features] == [
        (LEVELS[0], 16, 24), (LEVELS[1], 8, 12), (LEVELS[2], 4, 6), (LEVELS[3], 2, 3)]


def test_gradients_equal_diffusers(pair):
    """The gradient of every parameter and input equals diffusers'."""
    oracle, ours = pair
    latents, t, context = inputs((8, 16), N=5)
    sets = []
    for module in (oracle, ours):
        module.zero_grad()
        x, c = latents.clone().requires_grad_(), context.clone().requires_grad_()
        if module is oracle:
            output, features = hooked_features(oracle, x, t, c)
        else:
            features = ours(x, ours.embed_timestep(t), c)
            output = ours.to_latents(features[0])
        weights = torch.Generator().manual_seed(1)
        loss = sum((f * torch.randn(f.shape, generator=weights)).sum() for f in (output, *features))
        loss.backward()
        sets.append({"x": x.grad, "c": c.grad,
                     **{n: p.grad.clone() for n, p in module.named_parameters()}})
    # Some are zero but for rounding: whatever a norm with one channel per group takes out again.
    typical = torch.stack([g.abs().max() for g in sets[0].values()]).median()
    for name, expected in sets[0].items():
        scale = max(expected.abs().max(), 0.1 * typical)
        assert (sets[1][name] - expected).abs().max() / scale < ROUNDING, name


def composed(oracle, latents, temb, context):
    """The official rule for odd sizes, composed from diffusers' own blocks: the SKIP is resized."""
    x = oracle.conv_in(latents)
    skips, features = [x], []
    for block in oracle.down_blocks[:3]:
        x, outputs = block(x, temb, encoder_hidden_states=context)
        skips += outputs
    x, outputs = oracle.down_blocks[3](x, temb)
    skips += outputs
    x = oracle.mid_block(x, temb, encoder_hidden_states=context)
    for level, block in enumerate(oracle.up_blocks):
        for layer, resnet in enumerate(block.resnets):
            skip = skips.pop()
            if skip.shape[-2:] != x.shape[-2:]:
                skip = F.interpolate(skip, x.shape[-2:], mode="bilinear", align_corners=False)
            x = resnet(torch.cat([x, skip], dim=1), temb)
            if level > 0:
                x = block.attentions[layer](x, encoder_hidden_states=context)[0]
            if layer == (2 if level == 3 else 1):
                features.insert(0, x)
        if level < 3:
            x = block.upsamplers[0](x)
    return features


@pytest.mark.parametrize("size", [(9, 16), (35, 43), (20, 12), (8, 8)])
def test_odd_sizes_resize_the_skip(pair, size):
    """Sizes that are no multiple of 8 follow the official rule; out0 is rounded up to one."""
    oracle, ours = pair
    latents, t, context = inputs(size, N=3)
    with torch.no_grad():
        temb = ours.embed_timestep(t)
        features = ours(latents, temb, context)
        expected = composed(oracle, latents, temb, context)
    assert features[0].shape[-2:] == tuple(-(-s // 8) * 8 for s in size)
    for ours_i, expected_i in zip(features, expected):
        assert relative_error(ours_i, expected_i) < ROUNDING


def test_shared_inputs_equal_repeated_ones(pair):
    """temb and context of batch size 1 mean the same for every image."""
    _, ours = pair
    latents, t, context = inputs((16, 8), N=50, B=2)
    temb = ours.embed_timestep(t[:1])
    with torch.no_grad():
        shared = ours(latents, temb, context[:1])
        repeated = ours(latents, temb.expand(2, -1), context[:1].expand(2, -1, -1))
    for a, b in zip(shared, repeated):
        assert relative_error(a, b) < ROUNDING


def test_context_and_timestep_matter(pair):
    """Other prompts or another timestep change every feature."""
    _, ours = pair
    latents, t, context = inputs((8, 8))
    with torch.no_grad():
        base = ours(latents, ours.embed_timestep(t), context)
        for other in (ours(latents, ours.embed_timestep(t + 5), context),
                      ours(latents, ours.embed_timestep(t), context.flip(-1))):
            assert all(relative_error(a, b) > 1e-4 for a, b in zip(other[:3], base[:3]))


def test_attention_is_float32_on_a_cpu():
    """In bfloat16, autocast or not, attention equals float32's on the same values, rounded once:
    outputs and gradients.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16).bfloat16().requires_grad_() for n in (24, 7, 7))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide)
    expected.sum().backward()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            h = our.attend(q, k, v)
        assert h.dtype == torch.bfloat16 and torch.equal(h, expected.bfloat16())
        for x, grad in zip(wide, torch.autograd.grad(h.sum(), (q, k, v))):
            assert torch.equal(grad, x.grad.bfloat16())


def test_gradient_checkpointing_changes_nothing(pair):
    """Recomputing the blocks gives the same features and gradients, bit for bit."""
    ours = deepcopy(pair[1]).float()
    latents, t, context = (x.float() for x in inputs((8, 8)))
    results = []
    for ours.gradient_checkpointing in (False, True):
        ours.zero_grad()
        features = ours(latents, ours.embed_timestep(t), context)
        sum(f.square().mean() for f in features).backward()
        results.append([*features, *(p.grad for p in ours.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("N", [1, 11])
def test_maps_equal_diffusers(pair, size, N):
    """The map of every level is the mean of the probabilities in diffusers' cross-attentions there,
    also non-square; each position's sums to 1.
    """
    oracle, ours = pair
    latents, t, context = inputs(size, N)
    with torch.no_grad():
        _, expected = mapped_features(oracle, latents, t, context)
        _, maps = ours.with_maps(latents, ours.embed_timestep(t), context, (0, 1, 2))
        _, (one,) = ours.with_maps(latents, ours.embed_timestep(t), context, (1,))
    errors = [relative_error(a, b) for a, b in zip(maps, expected)]
    print("\n" + " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < ROUNDING and torch.equal(one, maps[1])
    for level, m in enumerate(maps):
        assert m.shape == (2, N, size[0] >> level, size[1] >> level)
        assert relative_error(m.sum(dim=1), torch.ones(m[:, 0].shape).double()) < ROUNDING


def test_maps_of_a_distilled_unet_equal_diffusers():
    """With one layer per block, as in BK-SDM-Base, a level has three cross-attentions."""
    oracle = diffusers_unet(context_dim=CONTEXT, layers=1).double()
    ours = UNet(UNetConfig(LEVELS, layers=1, context_dim=CONTEXT)).double()
    ours.load_state_dict(oracle.state_dict())
    latents, t, context = inputs((8, 8), N=3)
    with torch.no_grad():
        _, expected = mapped_features(oracle, latents, t, context)
        _, maps = ours.with_maps(latents, ours.embed_timestep(t), context, (0, 1, 2))
    assert all(relative_error(a, b) < ROUNDING for a, b in zip(maps, expected))


def test_maps_cost_the_features_nothing(pair, monkeypatch):
    """Features are the same bit for bit beside maps; without maps no score is ever computed; a
    context for all images gives each its own map.
    """
    ours = deepcopy(pair[1]).float()
    latents, t, context = (x.float() for x in inputs((8, 8), N=7))
    temb = ours.embed_timestep(t[:1])
    with torch.no_grad():
        beside, maps = ours.with_maps(latents, temb, context[:1], (2, 1))
        _, repeated = ours.with_maps(latents, temb, context[:1].expand(2, -1, -1), (2, 1))
        monkeypatch.setattr(our.Attention, "map", None)
        plain = ours(latents, temb, context[:1])
    assert all(torch.equal(a, b) for a, b in zip(plain, beside))
    assert [m.shape for m in maps] == [(2, 7, 2, 2), (2, 7, 4, 4)]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(maps, repeated))
    assert not torch.allclose(maps[0][0], maps[0][1])


def with_gradients(unet, call):
    """Features, maps, and the gradients of a loss on both."""
    latents, t, context = inputs((8, 8), N=5)
    unet.zero_grad()
    features, maps = call(latents, unet.embed_timestep(t).detach(), context, (1, 2))
    sum(x.square().mean() for x in (*features, *maps)).backward()
    return [*features, *maps, *(p.grad.clone() for p in unet.parameters() if p.grad is not None)]


def test_maps_are_the_same_when_recomputed(pair):
    """Gradient checkpointing gives the same features, maps and gradients (those through the maps,
    too) bit for bit, also in a second pass.
    """
    ours = deepcopy(pair[1])
    plain = with_gradients(ours, ours.with_maps)
    ours.gradient_checkpointing = True
    for _ in range(2):
        assert all(map(torch.equal, plain, with_gradients(ours, ours.with_maps)))


def assert_same(plain, compiled):
    """All tensors are equal but for rounding; some gradients are zero but for it."""
    typical = torch.stack([x.abs().max() for x in plain]).median()
    for a, b in zip(plain, compiled, strict=True):
        assert (a - b).abs().max() / max(a.abs().max(), 0.1 * typical) < ROUNDING


def test_maps_of_a_compiled_level_are_the_same(pair):
    """torch.compile of a level gives its outputs and its maps, without a graph break."""
    block = pair[1].down_blocks[1]
    x, temb, context = (torch.randn(shape).double()
                        for shape in ((1, LEVELS[0], 4, 4), (1, 4 * LEVELS[0]), (1, 3, CONTEXT)))
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        skips, maps = block(x, temb, context, True)
        again, maps_again = compiled(x, temb, context, True)
    assert len(maps) == 2
    assert_same([*skips, *maps], [*again, *maps_again])


@pytest.mark.slow
def test_maps_are_the_same_when_compiled(pair):
    """torch.compile of the whole gives the same features, maps and gradients, without a break."""
    ours = deepcopy(pair[1])
    compiled = torch.compile(ours.with_maps, backend="aot_eager", fullgraph=True)
    assert_same(with_gradients(ours, ours.with_maps), with_gradients(ours, compiled))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors",
                                  "diffusion_pytorch_model.fp16.safetensors"])
def test_loads_a_diffusers_folder(pair, tmp_path, name):
    """from_pretrained reads what diffusers saves: widths and heads come from the files."""
    oracle, _ = pair
    half = "fp16" in name
    model = diffusers_unet(context_dim=CONTEXT)
    if half:
        model.half()
    model.save_pretrained(tmp_path / "unet", variant="fp16" if half else None)
    assert (tmp_path / "unet" / name).is_file()
    unet = UNet.from_pretrained(str(tmp_path))
    assert unet.config == UNetConfig(LEVELS, context_dim=CONTEXT)
    for key, value in unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[key].float()), key


@pytest.mark.parametrize("key,value", [
    ("num_attention_heads", 4), ("resnet_out_scale_factor", 2.0),
    ("use_linear_projection", True), ("attention_head_dim", [5, 10, 20]),
    ("down_block_types", ["DownBlock2D"] * 4), ("act_fn", "gelu"), ("in_channels", 9),
    ("norm_num_groups", 5), ("norm_num_groups", 0), ("block_out_channels", [32, 64, 96, 96]),
    ("layers_per_block", 1), ("cross_attention_dim", 768), ("attention_head_dim", 7)])
def test_refuses_another_architecture(pair, tmp_path, key, value):
    """A config.json of another model (SD2, inpainting), or one that its tensors contradict, is
    refused by the field that differs.
    """
    diffusers_unet(context_dim=CONTEXT).save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    config[key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json: {key}"):
        UNet.from_pretrained(str(tmp_path))


def test_own_timestep_embedding_is_sinusoidal():
    """Cosines come first, frequencies fall from 1 to nearly 1/10000 (DDPM, Stable Diffusion)."""
    embedding = our.TimestepEmbedding(8, 16)
    captured = []
    embedding.linear_1.register_forward_pre_hook(lambda m, args: captured.append(args[0]))
    embedding(torch.tensor([3.0]))
    frequency = 10000 ** (-torch.arange(4) / 4)
    expected = torch.cat([(3 * frequency).cos(), (3 * frequency).sin()])
    assert torch.allclose(captured[0][0], expected, atol=1e-6)


@pytest.mark.slow
def test_full_width_equals_diffusers(tmp_path):
    """At SD1.5's width: HF files saved by diffusers, and the LDM single file, give its outputs."""
    from ldm_names import to_ldm
    from safetensors.torch import save_file
    oracle = diffusers_unet((320, 640, 1280, 1280), context_dim=768)
    oracle.save_pretrained(tmp_path / "unet")
    tensors = {"model.diffusion_model." + to_ldm(k, "unet"): v
               for k, v in oracle.state_dict().items()}
    save_file(tensors, tmp_path / "v1-5.safetensors")
    latents, t = torch.randn(1, 4, 24, 16), torch.tensor([421])
    context = torch.randn(1, 150, 768)
    with torch.no_grad():
        output, expected = hooked_features(oracle, latents, t, context)
        for source in (tmp_path, tmp_path / "v1-5.safetensors"):
            unet = UNet.from_pretrained(str(source)).eval()
            features = unet(latents, unet.embed_timestep(t), context)
            errors = [relative_error(a, b) for a, b in zip(features, expected)]
            errors.append(relative_error(unet.to_latents(features[0]), output))
            print(f"\n{source.name or 'folder'}: largest relative error {max(errors):.1e}")
            assert max(errors) < 1e-5


def test_random_weights_have_torch_defaults():
    """A UNet made from nothing is initialised (no meta tensors, finite forward)."""
    unet = UNet(UNetConfig((32, 32, 32, 32), num_heads=2, context_dim=16))
    out = unet(torch.randn(1, 4, 16, 16), torch.randn(1, 128), torch.randn(1, 2, 16))
    assert all(torch.isfinite(f).all() for f in out)
