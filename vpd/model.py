"""VPD (Zhao et al. 2023): Stable Diffusion 1.5, prompted with words, as a backbone of perception.

"Unleashing Text-to-Image Diffusion Models for Visual Perception", arXiv:2303.02153; official code:
wl-zhao/VPD, commit 92095ab.  The paper writes the prediction y of an image x, with the names S of
what there is to see, as p(y|F) p(F|x,C) p(C|S):

  p(C|S)    Prompting.  CLIP's embeddings of the names, moved a little by a trained text adapter.
  p(F|x,C)  One pass of the UNet, no noise added: its four features, and where each word's
            cross-attention looked, joined to the features of the same size as guidance.
  p(y|F)    A light decoder (vpd/heads.py).

What C is made of   seg    class_embeddings, one token per class, the same for every image
                    depth  class_embeddings, the one token of the image's scene type
                    refer  the states of all tokens of a sentence, padding included (vpd/text.py)
Symbols   B images   N tokens   D = 768 their width   H, W image size   P, Q: padded to 64s
          latents (B, 4, P/8, Q/8)   temb: timestep embedding   features: the UNet's four outputs
Trained: everything but the VAE encoder, and the text encoder, which is no part of the model.
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.errors import InputError, read_json
from ops.settings import from_dict
from unet import UNet, UNetConfig
from vae import VAEConfig, VAEEncoder
from vpd.heads import FPN, CoarseDepthHead, CoarseNeck, FPNHead, ReferHead
from weights import official_vpd
from weights.files import SD15, assemble, load_model, save_model

MAP_LEVELS = (1, 2)  # strides 16 and 32, whose maps are joined; official: max_attn_size


@dataclass(frozen=True)
class VPDConfig:
    """What a model is: saved as config.json beside the weights.  Defaults: ADE20K."""

    method: str = "vpd"  # tells this config.json from those of model.py
    task: str = "seg"  # "seg", "depth" or "refer"
    num_classes: int = 150  # rows of class_embeddings: classes (seg), 27 scene types (depth, NYU)
    class_names: tuple[str, ...] = ()
    num_tokens: int = 40  # refer: of a sentence; official: 40, on RefCOCOg 77
    timestep: int = 1  # official: "reduces stochasticity"; the paper says 0
    map_gradient: bool = False  # whether maps are trained through; official: they are constants
    latent_scale: float = 1.0  # official: no factor; Stable Diffusion itself uses 0.18215
    head_channels: int = 256  # seg; depth: 192, and 8 times as many before its decoder
    max_depth: float = 10.0  # depth, metres: 10 on NYU v2
    dropout: float = 0.1  # seg: on channels, before the classifier; official
    unet: UNetConfig = UNetConfig()  # D is its context_dim
    vae: VAEConfig = VAEConfig()

    def __post_init__(self):
        if self.task not in ("seg", "depth", "refer"):
            raise InputError(f"task {self.task!r} is unknown: seg, depth or refer")
        if self.task == "depth" and self.head_channels % 2:
            raise InputError(f"head_channels {self.head_channels}: even for depth, whose norm has "
                             "16 groups of 8 x head_channels")
        if self.unet.latent_channels != self.vae.latent_channels:
            raise InputError(f"the VAE gives {self.vae.latent_channels} latent channels, the UNet "
                             f"reads {self.unet.latent_channels}")

    @property
    def map_channels(self) -> int:
        """Tokens whose maps are joined to the features; depth has one token, which says nothing."""
        return {"seg": self.num_classes, "depth": 0, "refer": self.num_tokens}[self.task]


def pad(images: Tensor) -> Tensor:
    """Grey on the right and below, to sides that are multiples of 64: (B, 3, H, W) -> (B, 3, P, Q).

    DEVIATION: for all tasks and sizes; official: depth only, 480 and 352.  512 stays 512.
    """
    H, W = images.shape[-2:]
    return F.pad(images, (0, -W % 64, 0, -H % 64), value=0.5)


class VPDModel(nn.Module):
    """The paper's model for one task.

    model(images, text=text) -> prediction; model(images, target, text) -> named losses, to be
    added.  text: see `context`.  `encoder` and `backbone` may be given (pretrained), else they
    start from random weights; so may `class_embeddings` (num_classes, D), else they are zeros.
    """

    def __init__(self, config: VPDConfig, encoder: VAEEncoder | None = None,
                 backbone: UNet | None = None, class_embeddings: Tensor | None = None):
        super().__init__()
        self.config = config
        D, N = config.unet.context_dim, config.map_channels
        self.vae = encoder or VAEEncoder(config.vae)
        self.unet = backbone or UNet(config.unet)
        if config.task != "refer":
            rows = torch.zeros(config.num_classes, D)
            self.register_buffer("class_embeddings",
                                 rows if class_embeddings is None else class_embeddings.float())
        self.text_adapter = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
        self.gamma = nn.Parameter(torch.full((D,), 1e-4))
        widths = [c + N if level in MAP_LEVELS else c
                  for level, c in enumerate(config.unet.channels)]
        if config.task == "seg":
            self.neck = FPN(widths, config.head_channels)
            self.head = FPNHead(config.head_channels, config.num_classes, config.dropout)
        elif config.task == "depth":
            self.neck = CoarseNeck(widths, 8 * config.head_channels)
            self.head = CoarseDepthHead(config.head_channels, config.max_depth)
        else:
            self.neck, self.head = nn.Identity(), ReferHead(widths)
        self.vae.requires_grad_(False)
        self.unet.conv_norm_out.requires_grad_(False)    # the noise prediction is not computed
        self.unet.conv_out.requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """RGB (B, 3, H, W) in [0, 1] -> latents (B, 4, P/8, Q/8): posterior mean, no noise."""
        with torch.no_grad():
            return self.config.latent_scale * self.vae(2 * pad(images) - 1)

    def context(self, text: Tensor | None = None) -> Tensor:
        """What cross-attention reads, (B or 1, N, D).

        text   seg: None   depth: class numbers (B,), or None for the mean of all rows
               refer: the text encoder's states (B, num_tokens, D), not its pooled ones
        Raises InputError for anything else.
        """
        self.check(text)
        if self.config.task == "seg":
            tokens = self.class_embeddings[None]                           # (1, N, D)
        elif self.config.task == "refer":
            tokens = text                                                  # (B, N, D)
        elif text is None:
            tokens = self.class_embeddings.mean(dim=0)[None, None]         # (1, 1, D)
        else:
            tokens = self.class_embeddings[text][:, None]                  # (B, 1, D)
        return tokens + self.gamma * self.text_adapter(tokens)

    def check(self, text: Tensor | None) -> None:
        """InputError unless `text` is what the task reads."""
        shape, c = None if text is None else tuple(text.shape), self.config
        if c.task == "seg" and text is not None:
            raise InputError("segmentation reads its classes' embeddings: it takes no text")
        if c.task == "depth" and text is not None and (len(shape) != 1
                                                       or text.is_floating_point()):
            raise InputError(f"depth takes a class number per image, (B,), not {text.dtype} of "
                             f"shape {shape}")
        wanted = (c.num_tokens, c.unet.context_dim)
        if c.task == "refer" and (text is None or shape[1:] != wanted):
            raise InputError(f"a sentence is the text encoder's states (B, {wanted[0]}, "
                             f"{wanted[1]}), not {shape}")

    def features(self, images: Tensor, text: Tensor | None = None) -> list[Tensor]:
        """RGB in [0, 1], text as in `context` -> what the decoder reads, finest first."""
        t = torch.full((1,), self.config.timestep, device=images.device)
        levels = MAP_LEVELS if self.config.map_channels else ()
        latents = self.encode(images)                            # (B, 4, P/8, Q/8)       frozen
        context = self.context(text)                             # (B or 1, N, D)         p(C|S)
        temb = self.unet.embed_timestep(t)                       # (1, 4*C0)              trained
        features, maps = self.unet.with_maps(latents, temb, context, levels)  #           p(F|x,C)
        for level, m in zip(levels, maps):                       # (B, N, h_i, w_i)       guidance
            m = m if self.config.map_gradient else m.detach()
            features[level] = torch.cat([features[level], m], dim=1)
        return features                                          # 4 x (B, C_i (+ N), h_i, w_i)

    def forward(self, images: Tensor, target: Tensor | None = None, text: Tensor | None = None):
        """RGB in [0, 1], text as in `context` -> logits or metres at image size; with a target
        {name: loss}.
        """
        maps = self.neck(self.features(images, text))            # M x (B, C, h, w)
        if target is None:                                       # p(y|F)
            return self.head(maps, images.shape[-2:])            # (B, classes, 1 or 2, H, W)
        return self.head.loss(maps, target)                      # {name: loss}

    def loss(self, images: Tensor, target: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses of a batch; their sum is what training minimises."""
        return self(images, target, text)

    def param_groups(self, lr: float, unet_lr_mult: float, weight_decay: float) -> list[dict]:
        """AdamW groups that cover every trained parameter exactly once, by module identity.

        The UNet learns at lr * unet_lr_mult, as the official code EFFECTIVELY does it:
        seg: the norms of its transformers at the full lr without decay, all else decays.
        refer: those norms don't decay; there unet_lr_mult is written 0.01, but never applied: 1.
        depth: 1-D tensors don't decay.
        """
        task, backbone = self.config.task, {id(p) for p in self.unet.parameters()}
        norms = {id(p) for p in self.unet.transformer_norms()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in filter(lambda p: p.requires_grad, self.parameters()):
            free = p.ndim == 1 if task == "depth" else id(p) in norms
            slow = id(p) in backbone and not (task == "seg" and id(p) in norms)
            scale = unet_lr_mult if slow else 1.0
            groups.setdefault((scale, 0.0 if free else weight_decay), []).append(p)
        return [{"params": params, "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
                for (scale, decay), params in groups.items()]

    @classmethod
    def from_stable_diffusion(cls, config: VPDConfig, source: str = SD15,
                              class_embeddings: Tensor | None = None,
                              unet: str | None = None) -> "VPDModel":
        """A new model on pretrained weights: hub id, local folder or single LDM file.

        seg and depth: class_embeddings (num_classes, D), a text encoder's pooled states.
        `unet`: where its UNet is, if elsewhere (CleanDIFT's, a fine-tuned one).
        `config.unet` and `config.vae` are replaced by the files'.  Raises InputError.
        """
        encoder = VAEEncoder.from_pretrained(source)
        backbone = UNet.from_pretrained(unet or source, config.unet.num_heads)
        config = replace(config, unet=backbone.config, vae=encoder.config)
        wanted = None if config.task == "refer" else (config.num_classes,
                                                      config.unet.context_dim)
        shape = None if class_embeddings is None else tuple(class_embeddings.shape)
        if shape != wanted:
            raise InputError(f"class embeddings of shape {shape}: {config.task} on {source} "
                             f"wants {wanted}")
        return cls(config, encoder, backbone, class_embeddings)

    @classmethod
    def from_official(cls, path: str | Path, *, max_depth: float = 10.0) -> "VPDModel":
        """One of the authors' checkpoints (weights/official_vpd.py), in evaluation mode.

        max_depth matters for depth only and is not in the file: 10 for NYU v2.  Raises InputError
        if anything is missing, unknown, misshapen or not a tensor.
        """
        values, tensors = official_vpd.read(path)
        config = from_dict(VPDConfig, {**asdict(VPDConfig()), **values, "max_depth": max_depth},
                           str(path))
        return assemble(cls, config, tensors, Path(path)).eval()

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VPDModel":
        """Load what `save_pretrained` wrote, from a folder or a hub id, in evaluation mode.

        Raises InputError naming the file if something is missing, unknown, misshapen or truncated.
        """
        return load_model(cls, read_config, str(source))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder` (made if it does not exist)."""
        save_model(self, Path(folder))


def read_config(path: Path) -> VPDConfig:
    """config.json -> VPDConfig; InputError naming the field that is wrong."""
    values = read_json(path)
    if isinstance(values, dict) and values.get("method") != "vpd":
        raise InputError(f"{path} has no method vpd: it is of another model")
    return from_dict(VPDConfig, values, str(path))
