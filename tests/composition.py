"""What tests/benchmark.py compares: whole models, ours and one composed from diffusers' parts.

What is compared is how the backbone is handled, so everything else is the same: neck, head and the
learned tensors are OURS, the same objects.  diffusers' UNet and VAE encoder are given our
Parameters, too.  So weights, gradients and the optimiser's state exist once, two models of full
width fit where one does, and one optimiser trains both.
"""
import itertools
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

import train
from heads import IGNORE
from model import MetaPromptModel, enlarge, rearrange
from oracles import randomise
from ops.device import autocast
from tasks.recipes import RECIPES, Recipe
from unet import UNet, UNetConfig
from vae import VAEConfig, VAEEncoder

N_CLASSES = 150
DATASETS = {"seg": "ade20k", "depth": "nyu", "pose": "coco"}  # whose recipes are measured
TINY = {"unet": UNetConfig((32, 32, 64, 64), num_heads=4, context_dim=32),
        "vae": VAEConfig((32, 32, 32, 32)), "num_prompts": 16, "head_channels": 16,
        "deconv_channels": (16,)}


def peer_unet(ours: UNet) -> UNet2DConditionModel:
    """diffusers' UNet of the same widths, with our Parameters; whose `requires_grad` is set."""
    with torch.device("meta"):
        peer = UNet2DConditionModel(
            block_out_channels=ours.config.channels, attention_head_dim=ours.config.num_heads,
            cross_attention_dim=ours.config.context_dim, layers_per_block=ours.config.layers,
            in_channels=ours.config.latent_channels, out_channels=ours.config.latent_channels,
            norm_num_groups=ours.config.groups, sample_size=64)
    peer.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    return peer


def peer_vae(ours: VAEEncoder) -> AutoencoderKL:
    """diffusers' autoencoder without its decoder, with our Parameters (as `peer_unet`)."""
    with torch.device("meta"):
        peer = AutoencoderKL(
            block_out_channels=ours.config.channels, norm_num_groups=ours.config.groups,
            latent_channels=ours.config.latent_channels,
            layers_per_block=ours.config.layers, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4)
    del peer.decoder, peer.post_quant_conv               # a user who minds memory would do so
    peer.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    return peer


class LearnedTime(nn.Module):
    """In the place of diffusers' time embedding: the learned vector that comes in beside it."""

    def forward(self, sinusoid: Tensor, temb: Tensor) -> Tensor:
        """The sinusoid of the timestep is not used; temb (B, 4*C0) is the UNet's timestep_cond."""
        return temb


class Composed(nn.Module):
    """MetaPromptModel from diffusers' parts; called in the same way, modulated timesteps only."""

    def __init__(self, ours: MetaPromptModel):
        super().__init__()
        self.config = ours.config
        self.unet, self.vae = peer_unet(ours.unet), peer_vae(ours.vae)
        self.unet.time_embedding = LearnedTime()
        self.prompts, self.adapters, self.temb = ours.prompts, ours.adapters, ours.temb
        self.neck, self.head = ours.neck, ours.head
        ours.freeze()                                    # sharing has set requires_grad everywhere
        self.kept = {}
        up = self.unet.up_blocks
        taps = up[3].attentions[-1], up[2].attentions[-2], up[1].attentions[-2], up[0].resnets[-2]
        for level, layer in enumerate(taps):
            layer.register_forward_hook(self.keeper(level))

    def keeper(self, level: int):
        """A hook that keeps its layer's output as the feature of `level`."""
        def keep(layer, inputs, output):
            self.kept[level] = output if isinstance(output, Tensor) else output[0]
        return keep

    def encode(self, images: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1] -> the mean of the latents (B, 4, H/8, W/8)."""
        with torch.no_grad():
            images = enlarge(images, self.config.resize_scale)
            return self.config.latent_scale * self.vae.encode(2 * images - 1).latent_dist.mean

    def one_pass(self, latents: Tensor, temb: Tensor, prompts: Tensor):
        """(B, 4, h, w), (1, 4*C0), (1, N, D) -> the UNet's output (B, 4, h, w), four features."""
        B = len(latents)
        timesteps = torch.zeros(B, dtype=torch.long, device=latents.device)
        output = self.unet(latents, timesteps, prompts.expand(B, -1, -1),
                           timestep_cond=temb.expand(B, -1), return_dict=False)[0]
        return output, [self.kept.pop(level) for level in range(4)]

    def forward(self, images: Tensor, target: Tensor | None = None):
        """RGB in [0, 1] -> prediction; with a target {name: loss}."""
        latents = self.encode(images)
        for step in range(self.config.refine_steps):
            row = 0 if self.config.shared_prompts else step
            prompts = self.prompts[row:row + 1]
            if self.config.prompt_adapter:
                prompts = self.adapters[row](prompts)
            latents, features = self.one_pass(latents, self.temb[step:step + 1], prompts)
        maps = [rearrange(m, prompts) for m in self.neck(features)]
        if target is None:
            return self.head(maps, images.shape[-2:])
        return self.head.loss(maps, target)


# ------------------------------------------------------------------------------------------------
# UNet and VAE encoder by themselves

def forward_of(module, inputs):
    """A call without gradients."""
    def call():
        with torch.no_grad():
            return module(*inputs)
    return call


def backward_of(module, inputs):
    """A call with gradients of all parameters."""
    def call():
        module.zero_grad(set_to_none=True)
        output = module(*inputs)
        output.float().square().mean().backward()
        return output.detach()
    return call


class OurNoise(torch.nn.Module):
    """Our UNet up to the predicted noise, as diffusers returns it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timesteps, context):
        features = self.unet(latents, self.unet.embed_timestep(timesteps), context)
        return self.unet.to_latents(features[0])


class PeerNoise(torch.nn.Module):
    """diffusers' UNet, output as a tensor."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timesteps, context):
        return self.unet(latents, timesteps, context, return_dict=False)[0]


class PeerMean(torch.nn.Module):
    """diffusers' encoder up to the posterior mean."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, images):
        return self.vae.encode(images).latent_dist.mean


def cases(args, device):
    """(name, ours, peer, inputs, how to call) at the asked width and size."""
    recipe = sized_recipe(args, "seg", 1, training=False)
    B, side = recipe.batch, recipe.crop // 8
    with device:
        ours = UNet(recipe.model.unet)
        latents = torch.randn(B, 4, side, side)
        timesteps = torch.zeros(B, dtype=torch.long)
        context = torch.randn(1, recipe.model.num_prompts, recipe.model.unet.context_dim)
        context = context.expand(B, -1, -1)
    peer, inputs = peer_unet(randomise(ours)), (latents, timesteps, context)
    yield "UNet forward", OurNoise(ours), PeerNoise(peer), inputs, forward_of
    yield "UNet forward+backward", OurNoise(ours), PeerNoise(peer), inputs, backward_of
    del peer, ours
    with device:
        ours = VAEEncoder(recipe.model.vae)
        images = torch.rand(B, 3, 8 * side, 8 * side) * 2 - 1
    peer = peer_vae(randomise(ours))
    yield "VAE encode", ours, PeerMean(peer), (images,), forward_of


# ------------------------------------------------------------------------------------------------
# The two sides of a whole step, by train.py's recipes

def sized_recipe(args, task: str, passes: int, training: bool) -> Recipe:
    """The task's recipe on Stable Diffusion at the asked width, size and batch.

    A step is one micro-batch, for segmentation of 2 images at least; a prediction is of as many
    images as the protocol takes at once.  The learning rate is 0: the same work, and the weights
    stay those that were compared.
    """
    recipe = RECIPES[task, DATASETS[task]]
    if training:
        batch = max(args.batch or recipe.micro_batch, 2 if task == "seg" else 1)
    else:
        batch = args.batch or recipe.protocol.at_once
    model = replace(recipe.model, refine_steps=passes, **(TINY if args.width == "tiny" else {}))
    recipe = replace(recipe, model=model, lr=0.0, batch=batch, micro_batch=batch,
                     gradient_checkpointing=args.gradient_checkpointing)
    size = args.size or (16 if args.width == "tiny" else None)
    if size is None:
        return recipe
    return replace(recipe, model=replace(model, resize_scale=0), crop=8 * size, crop_width=None)


def random_batch(recipe: Recipe, device: torch.device) -> dict:
    """Random images with targets, as the loader gives them; every class is present."""
    B, H, W = recipe.batch, recipe.crop, recipe.crop_width or recipe.crop
    with device:
        if recipe.task == "seg":
            target = torch.randint(0, N_CLASSES, (B, H, W))
        elif recipe.task == "depth":
            target = recipe.model.max_depth * torch.rand(B, H, W)
        else:
            target = torch.rand(B, 17, 3) * torch.tensor([W, H, 0]) + torch.tensor([0, 0, 1])
        return {"image": torch.rand(B, 3, H, W), "target": target, "name": ["random"] * B}


def our_model(recipe: Recipe, device: torch.device) -> MetaPromptModel:
    """A new model of the recipe, random weights, made where it will be."""
    torch.manual_seed(0)
    with device:
        model = MetaPromptModel(replace(recipe.model, num_classes=N_CLASSES))
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    return model


def composed(ours: MetaPromptModel) -> Composed:
    """The same model from diffusers' parts; it checkpoints if ours does, but for the level of 1/64,
    whose hook torch.compile would lose inside a checkpoint.  Its maps are small.
    """
    peer = Composed(ours)
    if ours.unet.gradient_checkpointing:
        peer.unet.enable_gradient_checkpointing()
        peer.unet.up_blocks[0].gradient_checkpointing = False
    return peer


def compiled(model, how: str):
    """`whole`: as train.py --compile does, all passes in one graph.  `parts`: encoder, UNet and
    neck by themselves, in place, which takes a T-th of the time: the passes share the UNet's.
    """
    torch.compiler.reset()
    if how == "whole":
        return torch.compile(model)
    for part in (model.vae.encoder, model.unet, model.neck):
        part.compile()
    return model


def training_of(model, recipe: Recipe, batch: dict, optimizer, device, dtype: torch.dtype):
    """A call of train.py's own step, with AdamW's; it returns the losses."""
    batches = itertools.repeat(batch)
    model.train()
    return lambda: train.train_step(model, optimizer, batches, recipe, 0, device, dtype)


def inference_of(model, images: Tensor, dtype: torch.dtype):
    """A call that predicts as tasks/ do, but for inference mode, whose einsum can't be
    counted under autocast.
    """
    model.eval()

    def call():
        with torch.no_grad(), autocast(images.device, dtype):
            return model(images)
    return call


def step_calls(models: dict, recipe: Recipe, training: bool, device, dtype: torch.dtype) -> dict:
    """{"ours": call, "peer": call} on the same images; one optimiser, as weights exist once."""
    batch = random_batch(recipe, device)
    if not training:
        return {side: inference_of(m, batch["image"], dtype) for side, m in models.items()}
    optimizer = train.build_optimizer(models["ours"], recipe)
    return {side: training_of(m, recipe, batch, optimizer, device, dtype)
            for side, m in models.items()}


# ------------------------------------------------------------------------------------------------
# Lovasz-softmax

def lovasz_gradient(truth: Tensor) -> Tensor:
    """(P,) truth in descending order of the errors -> growth of the Jaccard loss at each pixel."""
    area = truth.sum()
    jaccard = 1 - (area - truth.cumsum(0)) / (area + (1 - truth).cumsum(0))
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def lovasz_by_class(logits: Tensor, target: Tensor) -> Tensor:
    """The usual Lovasz-softmax (Berman et al. 2018): valid pixels, then a loop over the classes.

    logits (B, C, H, W), labels (B, H, W); the mean over the classes that are present.
    """
    probs = logits.softmax(dim=1).movedim(1, -1).flatten(0, 2)             # (P, C)
    labels = target.flatten()
    probs, labels = probs[labels != IGNORE], labels[labels != IGNORE]
    losses = []
    for number in range(probs.shape[1]):
        truth = (labels == number).to(probs.dtype)
        if truth.sum() == 0:
            continue
        errors, order = (truth - probs[:, number]).abs().sort(descending=True)
        losses.append(torch.dot(errors, lovasz_gradient(truth[order])))
    return torch.stack(losses).mean()


def loss_and_gradient(function, logits, target):
    """A call that returns both."""
    def call():
        logits.grad = None
        loss = function(logits, target)
        loss.backward()
        return {"loss": loss.detach(), "gradient": logits.grad}
    return call
