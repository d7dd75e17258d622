"""Meta Prompts (Wan et al. 2023): Stable Diffusion 1.5 as a feature extractor for perception.

"Harnessing Diffusion Models for Visual Perception with Meta Prompts", arXiv:2312.14733.  The
official code has segmentation and depth (fudan-zvg/meta-prompts, commit 5628dd9).  Three ideas:

  3.2.1  Meta prompts.  N learnable vectors take the place of the text embeddings that the UNet's
         cross-attention reads.  No text encoder, no captions, no class names.
  3.3    Recurrent refinement.  The UNet's output, same shape as its input, is fed back T times.
         Each pass has its own learned timestep embedding; no noise is added anywhere.
  3.2.2  Feature rearrangement.  The last pass's features are projected to the prompts' space and
         multiplied with them: N response maps, which the task head reads.

Symbols   B images   N prompts   D = 768 prompt width   T passes   H, W image size
          latents (B, 4, H/8, W/8)   temb: timestep embedding   features: the UNet's four outputs
Trained: everything but the VAE encoder and Stable Diffusion's own time embedding.
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from heads import DepthHead, FusionNeck, PoseHead, PyramidNeck, SegHead, resize
from ops.errors import InputError, read_json
from ops.settings import from_dict
from unet import UNet, UNetConfig
from vae import VAEConfig, VAEEncoder
from weights import official
from weights.files import SD15, assemble, load_model, modern_config, save_model


@dataclass(frozen=True)
class Config:
    """What a model is: saved as config.json beside the weights.  Defaults: ADE20K."""

    task: str = "seg"  # "seg", "depth" or "pose"
    num_prompts: int = 150  # N; paper Tables 6 (seg 150) and 7 (depth 50), A.3 (pose 150)
    refine_steps: int = 3  # T; paper 4.3
    shared_prompts: bool = True  # one matrix for all passes (official seg), or one per pass (depth)
    prompt_adapter: bool = False  # Linear-GELU-Linear on the prompts (official depth only)
    fixed_prompts: bool = False  # text embeddings, not trained; only their adapter is (Table 5)
    modulated_timestep: bool = True  # False: SD's own embedding of t=0 in each pass (Table 5)
    rearrange: bool = True  # False: the head reads the projected features themselves (Table 5)
    latent_scale: float = 1.0  # official: no factor; Stable Diffusion itself uses 0.18215
    train_encoder: bool = False  # move the VAE encoder, too; the paper freezes it
    num_classes: int = 150
    class_names: tuple[str, ...] = ()
    head_channels: int = 512  # official: UPerHead 512, depth decoder 192
    max_depth: float = 10.0  # depth, metres: 10 on NYU v2, 80 on KITTI
    resize_scale: int = 0  # s: sides become (side // 64 + s) * 64; official: depth, 1 NYU, 2 KITTI
    deconv_channels: tuple[int, ...] = (256,)  # pose: each doubles stride 8's maps; ours
    sigma: float = 4.0  # pose: of a joint's blob, in heatmap pixels; ours, for 576x448
    dropout: float = 0.0  # on channels, before the classifier: 0 on ADE20K, 0.1 on Cityscapes
    unet: UNetConfig = UNetConfig()  # D is its context_dim
    vae: VAEConfig = VAEConfig()

    def __post_init__(self):
        if self.task not in ("seg", "depth", "pose"):
            raise InputError(f"task {self.task!r} is unknown: seg, depth or pose")
        if self.task == "pose" and (3 * self.sigma) % 1:
            raise InputError(f"sigma {self.sigma}: 3 sigma must be an integer, else a blob's "
                             "window is cut off centre")
        if self.unet.latent_channels != self.vae.latent_channels:
            raise InputError(f"the VAE gives {self.vae.latent_channels} latent channels, the UNet "
                             f"reads {self.unet.latent_channels}")


def rearrange(features: Tensor, prompts: Tensor) -> Tensor:
    """Feature rearrangement (3.2.2): how much each position answers to each prompt.

    features (B, D, h, w), prompts (1 or B, N, D) -> responses (B, N, h, w); a plain dot product,
    neither scaled nor normalised (official: segmentation/models/model.py).
    """
    return torch.einsum("bdhw,bnd->bnhw", features, prompts)


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Resize images (B, 3, H, W) to sides of (side // 64 + scale) * 64; scale 0 leaves them alone.
    Official depth model: `scale` is added even to sides that are multiples of 64 (480 -> 512).
    """
    if scale == 0:
        return images
    return resize(images, [(side // 64 + scale) * 64 for side in images.shape[-2:]])


class MetaPromptModel(nn.Module):
    """The paper's model for one task.

    model(images) -> prediction (see forward); model(images, target) -> named losses, to be added.
    `encoder` and `backbone` may be given (pretrained); else they start from random weights.
    """

    def __init__(self, config: Config, encoder: VAEEncoder | None = None,
                 backbone: UNet | None = None):
        super().__init__()
        self.config = config
        N, D, T = config.num_prompts, config.unet.context_dim, config.refine_steps
        self.vae = encoder or VAEEncoder(config.vae)
        self.unet = backbone or UNet(config.unet)
        rows = 1 if config.shared_prompts else T
        self.prompts = nn.Parameter(torch.randn(rows, N, D))               # paper: random values
        self.adapters = nn.ModuleList([                                    # an MLP, no residual
            nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
            for _ in range(rows if config.prompt_adapter else 0)])
        if config.modulated_timestep:
            self.temb = nn.Parameter(torch.randn(T, self.unet.temb_dim))
        c_head = N if config.rearrange else D
        if config.task == "seg":
            self.neck = PyramidNeck(config.unet.channels, D)
            self.head = SegHead(c_head, config.head_channels, config.num_classes, config.dropout)
        else:
            self.neck = FusionNeck(config.unet.channels, D)
            self.head = (DepthHead(c_head, config.head_channels, config.max_depth)
                         if config.task == "depth" else
                         PoseHead(c_head, config.deconv_channels, config.sigma))
        self.freeze()

    def freeze(self) -> None:
        """Fix what the method does not train, and what no gradient reaches."""
        self.vae.requires_grad_(self.config.train_encoder)                 # 3.1
        self.unet.time_embedding.requires_grad_(False)                     # 3.3: replaced by temb
        self.prompts.requires_grad_(not self.config.fixed_prompts)         # Table 5
        if self.config.refine_steps == 1:                                  # its output is not read
            self.unet.conv_norm_out.requires_grad_(False)
            self.unet.conv_out.requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1] -> latents (B, 4, H/8, W/8): posterior mean, no noise."""
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            images = enlarge(images, self.config.resize_scale)
            return self.config.latent_scale * self.vae(2 * images - 1)

    def context(self, step: int) -> Tensor:
        """The prompts of pass `step`, (1, N, D): the same for every image."""
        row = 0 if self.config.shared_prompts else step
        prompts = self.prompts[row:row + 1]
        return self.adapters[row](prompts) if self.config.prompt_adapter else prompts

    def timestep(self, step: int) -> Tensor:
        """The time embedding of pass `step`, (1, 4*C0)."""
        if self.config.modulated_timestep:
            return self.temb[step:step + 1]
        return self.unet.embed_timestep(torch.zeros(1, device=self.prompts.device))

    def refine(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """RGB in [0, 1], any H, W >= 64 -> (features of the last pass, its prompts)."""
        latents = self.encode(images)                       # (B, 4, H/8, W/8)        3.1   frozen
        for step in range(self.config.refine_steps):        # T passes                3.3
            if step > 0:
                latents = self.unet.to_latents(features[0]) # (B, 4, H/8, W/8)        3.3   fed back
            prompts = self.context(step)                    # (1, N, D)               3.2.1 learned
            temb = self.timestep(step)                      # (1, 4*C0)               3.3   learned
            features = self.unet(latents, temb, prompts)    # 4 x (B, C_i, h_i, w_i)  3.1
        return features, prompts

    def responses(self, images: Tensor) -> list[Tensor]:
        """RGB in [0, 1] -> what the head reads, finest first: a map per prompt, else D channels."""
        features, prompts = self.refine(images)
        maps = self.neck(features)                          # M x (B, D, h, w)        M = 4, else 1
        if self.config.rearrange:
            maps = [rearrange(m, prompts) for m in maps]    # M x (B, N, h, w)        3.2.2
        return maps

    def forward(self, images: Tensor, target: Tensor | None = None):
        """RGB in [0, 1] -> logits or metres at image size, or heatmaps; with a target {name: loss}.
        For seg B >= 2 in training mode (BatchNorm of a 1x1 map needs two values).
        """
        maps = self.responses(images)
        if target is None:
            return self.head(maps, images.shape[-2:])       # (B, classes or 1, H, W), 17 heatmaps
        return self.head.loss(maps, target)                 # {name: loss}

    def features(self, images: Tensor) -> list[Tensor]:
        """RGB in [0, 1] -> the UNet's last features, 4 x (B, C_i, h_i, w_i), finest first."""
        return self.refine(images)[0]

    def loss(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Named losses of a batch; their sum is what training minimises."""
        return self(images, target)

    def param_groups(self, lr: float, unet_lr_mult: float, weight_decay: float) -> list[dict]:
        """AdamW groups that cover every trained parameter exactly once, by module identity.

        The UNet, and the encoder where it is trained, learn at lr * unet_lr_mult.
        Segmentation as the official code EFFECTIVELY does it (its rule for `norm` goes before
        `unet`): the norms in the UNet's transformers learn at the full lr without decay, all else
        decays.
        Depth and pose: 1-D tensors don't decay, prompts and temb do.
        """
        backbone = {id(p) for p in (*self.unet.parameters(), *self.vae.parameters())}
        norms = {id(p) for p in self.unet.transformer_norms()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in self.parameters():
            if p.requires_grad:
                full_rate = self.config.task == "seg" and id(p) in norms
                free = full_rate if self.config.task == "seg" else p.ndim == 1
                scale = unet_lr_mult if id(p) in backbone and not full_rate else 1.0
                groups.setdefault((scale, 0.0 if free else weight_decay), []).append(p)
        return [{"params": params, "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
                for (scale, decay), params in groups.items()]

    @classmethod
    def from_stable_diffusion(cls, config: Config, source: str = SD15,
                              unet: str | None = None) -> "MetaPromptModel":
        """A new model on pretrained weights: hub id, local folder or single LDM file.

        `unet`: where its UNet is, if elsewhere (CleanDIFT's, a fine-tuned one).
        `config.unet` and `config.vae` are replaced by the files'.  Raises InputError.
        """
        encoder = VAEEncoder.from_pretrained(source)
        backbone = UNet.from_pretrained(unet or source, config.unet.num_heads)
        return cls(replace(config, unet=backbone.config, vae=encoder.config), encoder, backbone)

    @classmethod
    def from_official(cls, path: str | Path, *, max_depth: float = 10.0,
                      resize_scale: int = 1) -> "MetaPromptModel":
        """One of the authors' checkpoints (weights/official.py), in evaluation mode.

        The last two matter for depth only and are not in the file: 10 and 1 for NYU v2, 80 and 2
        for KITTI.  Raises InputError if anything is missing, unknown, misshapen or not a tensor.
        """
        values, tensors = official.read(path)
        if values["task"] == "depth":
            values.update(max_depth=max_depth, resize_scale=resize_scale)
        config = from_dict(Config, {**asdict(Config()), **values}, str(path))
        return assemble(cls, config, tensors, Path(path)).eval()

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "MetaPromptModel":
        """Load what `save_pretrained` wrote, from a folder or a hub id, in evaluation mode.

        Raises InputError naming the file if something is missing, unknown, misshapen or truncated.
        """
        return load_model(cls, read_config, str(source))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder` (made if it does not exist)."""
        save_model(self, Path(folder))


def read_config(path: Path) -> Config:
    """config.json -> Config; InputError naming the field that is wrong."""
    return from_dict(Config, modern_config(read_json(path), asdict(Config())), str(path))
