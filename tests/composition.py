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
from oracles import KeepMaps, randomise
from ops.device import autocast, cast_weights
from tasks import methods
from tasks.recipes import Recipe, find_recipe
from unet import UNet, UNetConfig
from vae import VAEConfig, VAEEncoder
from vpd.model import MAP_LEVELS, VPDModel

N_CLASSES = 150
ROWS = {"seg": ("seg", "ade20k"), "depth": ("depth", "nyu"), "pose": ("pose", "coco"),
        "vpd": ("seg", "ade20k", "vpd")}  # whose recipes are measured
WIDTHS = {  # what is changed of the recipe's model
    "sd15": {},
    "narrow": {"unet": UNetConfig((64, 128, 256, 256)), "vae": VAEConfig((32, 64, 128, 128)),
               "head_channels": 128},
    "tiny": {"unet": UNetConfig((32, 32, 64, 64), num_heads=4, context_dim=32),
             "vae": VAEConfig((32, 32, 32, 32)), "num_prompts": 16, "head_channels": 16,
             "deconv_channels": (16,)}}


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


class Peer(nn.Module):
    """diffusers' parts with the Parameters of a model of ours, and our neck and head."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.config, self.neck, self.head, self.kept = ours.config, ours.neck, ours.head, {}
        trained = [(p, p.requires_grad) for p in ours.parameters()]
        self.unet, self.vae = peer_unet(ours.unet), peer_vae(ours.vae)
        for p, wanted in trained:                        # sharing has set it everywhere
            p.requires_grad_(wanted)
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
            return self.config.latent_scale * self.vae.encode(2 * images - 1).latent_dist.mean

    def one_pass(self, latents: Tensor, timestep: int, context: Tensor, temb: Tensor | None = None):
        """(B, 4, h, w), 0..999, (1, N, D), a learned time (1, 4*C0) -> the UNet's output
        (B, 4, h, w), four features.
        """
        B = len(latents)
        timesteps = torch.full((B,), timestep, device=latents.device)
        temb = None if temb is None else temb.expand(B, -1)
        output = self.unet(latents, timesteps, context.expand(B, -1, -1), timestep_cond=temb,
                           return_dict=False)[0]
        return output, [self.kept.pop(level) for level in range(4)]


class Composed(Peer):
    """MetaPromptModel from diffusers' parts; called in the same way, modulated timesteps only."""

    def __init__(self, ours: MetaPromptModel):
        super().__init__(ours)
        self.unet.time_embedding = LearnedTime()
        self.prompts, self.adapters, self.temb = ours.prompts, ours.adapters, ours.temb

    def forward(self, images: Tensor, target: Tensor | None = None):
        """RGB in [0, 1] -> prediction; with a target {name: loss}."""
        latents = self.encode(enlarge(images, self.config.resize_scale))
        for step in range(self.config.refine_steps):
            row = 0 if self.config.shared_prompts else step
            prompts = self.prompts[row:row + 1]
            if self.config.prompt_adapter:
                prompts = self.adapters[row](prompts)
            latents, features = self.one_pass(latents, 0, prompts, self.temb[step:step + 1])
        maps = [rearrange(m, prompts) for m in self.neck(features)]
        if target is None:
            return self.head(maps, images.shape[-2:])
        return self.head.loss(maps, target)


class ComposedVPD(Peer):
    """VPDModel of task seg from diffusers' parts; attention maps as users read them, by processors
    that compute the weights themselves.
    """

    def __init__(self, ours: VPDModel):
        super().__init__(ours)
        self.register_buffer("class_embeddings", ours.class_embeddings)
        self.text_adapter, self.gamma = ours.text_adapter, ours.gamma
        self.processors = {level: [] for level in MAP_LEVELS}
        for level, processors in self.processors.items():
            for block in (self.unet.down_blocks[level], self.unet.up_blocks[3 - level]):
                for transformer in block.attentions:
                    processors.append(KeepMaps())
                    transformer.transformer_blocks[0].attn2.set_processor(processors[-1])

    def forward(self, images: Tensor, target: Tensor | None = None):
        """RGB in [0, 1], sides of multiples of 64 -> prediction; with a target {name: loss}."""
        context = self.class_embeddings[None]
        context = context + self.gamma * self.text_adapter(context)
        features = self.one_pass(self.encode(images), self.config.timestep, context)[1]
        for level, processors in self.processors.items():
            maps = torch.stack([p.map for p in processors]).mean(dim=0).transpose(1, 2)
            maps = maps.unflatten(2, features[level].shape[-2:]).detach()
            features[level] = torch.cat([features[level], maps], dim=1)
        maps = self.neck(features)
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


def unet_case(args, device):
    """(ours, peer, inputs) at the asked width and size; the peer has our Parameters."""
    recipe = sized_recipe(args, "seg", 1, training=False)
    B, side = recipe.batch, recipe.crop // 8
    with device:
        ours = UNet(recipe.model.unet)
        latents = torch.randn(B, 4, side, side)
        timesteps = torch.zeros(B, dtype=torch.long)
        context = torch.randn(1, recipe.model.num_prompts, recipe.model.unet.context_dim)
        context = context.expand(B, -1, -1)
    peer = peer_unet(randomise(ours))
    return OurNoise(ours), PeerNoise(peer), (latents, timesteps, context)


def vae_case(args, device):
    """(ours, peer, inputs) at the asked width and size; the peer has our Parameters."""
    recipe = sized_recipe(args, "seg", 1, training=False)
    with device:
        ours = VAEEncoder(recipe.model.vae)
        images = torch.rand(recipe.batch, 3, recipe.crop, recipe.crop) * 2 - 1
    peer = peer_vae(randomise(ours))
    return ours, PeerMean(peer), (images,)


# ------------------------------------------------------------------------------------------------
# The two sides of a whole step, by train.py's recipes

def sized_recipe(args, row: str, passes: int, training: bool) -> Recipe:
    """The row's recipe on Stable Diffusion at the asked width, size and batch.

    A step is one micro-batch, for segmentation of 2 images at least; a prediction is of as many
    images as the protocol takes at once.  The learning rate is 0: the same work, and the weights
    stay those that were compared.
    """
    recipe = find_recipe(*ROWS[row])
    if training:
        batch = max(args.batch or recipe.micro_batch, 2 if recipe.task == "seg" else 1)
    else:
        batch = args.batch or recipe.protocol.at_once
    changes = {"refine_steps": passes, **WIDTHS[args.width]}
    model = replace(recipe.model, **{name: value for name, value in changes.items()
                                     if hasattr(recipe.model, name)})
    recipe = replace(recipe, model=model, lr=0.0, batch=batch, micro_batch=batch,
                     gradient_checkpointing=args.gradient_checkpointing)
    size = args.size or (16 if args.width == "tiny" else None)
    if size is None:
        return recipe
    if hasattr(model, "resize_scale"):
        model = replace(model, resize_scale=0)
    return replace(recipe, model=model, crop=8 * size, crop_width=None)


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


def our_model(recipe: Recipe, device: torch.device) -> MetaPromptModel | VPDModel:
    """A new model of the recipe, random weights, made where it will be."""
    torch.manual_seed(0)
    with device:
        model = methods.kind_of(recipe.model)(replace(recipe.model, num_classes=N_CLASSES))
    if recipe.method == "vpd":                           # its default, zeros, would hide mistakes
        model.class_embeddings.normal_()
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    return model


def composed(ours: MetaPromptModel | VPDModel) -> Composed | ComposedVPD:
    """The same model from diffusers' parts; it checkpoints if ours does, but for the level of 1/64,
    whose hook torch.compile would lose inside a checkpoint.  Its maps are small.
    """
    peer = (ComposedVPD if isinstance(ours, VPDModel) else Composed)(ours)
    if ours.unet.gradient_checkpointing:
        peer.unet.enable_gradient_checkpointing()
        peer.unet.up_blocks[0].gradient_checkpointing = False
    return peer


def compile_both(models: dict) -> None:
    """Ours as train.py does, the peer's UNet, encoder and neck in place; channels last, both, as
    they share their weights.
    """
    torch.compiler.reset()
    for side, model in models.items():
        model.to(memory_format=torch.channels_last)
        if side == "ours":
            methods.compile_parts(model)
        else:
            for part in (model.vae.encoder, model.unet, model.neck):
                part.compile()


def training_of(model, recipe: Recipe, batch: dict, optimizer, device, dtype: torch.dtype):
    """A call of train.py's own step, with AdamW's; it returns the losses."""
    batches = itertools.repeat(batch)

    def call():
        model.train()
        return train.train_step(model, optimizer, batches, recipe, 0, device, dtype)
    return call


def inference_of(model, images: Tensor, dtype: torch.dtype):
    """A call that predicts as tasks/ do, but for inference mode, whose einsum can't be
    counted under autocast.
    """
    def call():
        model.eval()
        with torch.no_grad(), autocast(images.device, dtype):
            return model(images)
    return call


def step_calls(models: dict, recipe: Recipe, training: bool, device, dtype: torch.dtype) -> dict:
    """{"ours": call, "peer": call} on the same images; one optimiser, as weights exist once.

    Predicting, they hold the weights in the asked precision, as eval.py does.
    """
    batch = random_batch(recipe, device)
    if not training:
        cast_weights(models["ours"], dtype)
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
