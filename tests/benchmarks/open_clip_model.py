"""open_clip's CLIP in the size of the demo, with the update of its training script."""

from __future__ import annotations

import math

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from internvl_jax.batch import MEAN, STD
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.train.optimizer import OptimConfig


class OpenClip(nn.Module):
    """open_clip's model and loss, from the same batches as the others."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CLIP):
        super().__init__()
        self.model, self.loss = model, ClipLoss()
        mean, std = (255 * torch.tensor(m).view(3, 1, 1) for m in (MEAN, STD))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> float [B, 3, S, S]."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return self.loss(**self.model(self.normalized(images), ids))

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> [B, E]."""
        return self.model.encode_image(self.normalized(images))

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] -> [B, E]."""
        return self.model.encode_text(ids)

    def clamp(self) -> None:
        """Keeps the temperature in CLIP's bounds, as its train loop does after each step."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))


def build(cfg: InternVLConfig, text_length: int, eos: int) -> OpenClip:
    """As many layers, heads and tokens, of the same width, and nearly as many parameters.

    A gated feed-forward block has three matrices where CLIP's has two: the text tower's is 1.5
    times as wide instead. The image is pooled by one query over all tokens, as InternVL's is.
    """
    v, t = cfg.vision, cfg.qllama
    vision = CLIPVisionCfg(
        layers=v.depth,
        width=v.width,
        head_width=v.width // v.heads,
        mlp_ratio=v.mlp_dim / v.width,
        patch_size=v.patch_size,
        image_size=v.image_size,
        attentional_pool=True,
        attn_pooler_queries=1,
        attn_pooler_heads=cfg.pool_heads,
        patch_dropout=0.5,  # makes the module; `set_keep` sets the share
    )
    text = CLIPTextCfg(
        context_length=text_length,
        vocab_size=t.vocab_size,
        width=t.width,
        heads=t.heads,
        layers=t.depth,
        mlp_ratio=1.5 * t.mlp_dim / t.width,
        pool_type="eos",
        eos_id=eos,
    )
    model = CLIP(cfg.embed_dim, vision, text, init_logit_scale=cfg.logit_scale, output_dict=True)
    return OpenClip(model)


def set_keep(model: OpenClip, keep: float) -> None:
    """Patch dropout to the share that stays, CLS aside."""
    for part in model.modules():
        if isinstance(part, PatchDropout):
            part.prob = 1 - keep


def adamw(model: OpenClip, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of its training script: gains and biases do not decay."""
    bare = lambda name, p: p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name
    named = list(model.named_parameters())
    groups = [
        dict(params=[p for name, p in named if bare(name, p)], weight_decay=0.0),
        dict(params=[p for name, p in named if not bare(name, p)], weight_decay=optim.weight_decay),
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim.b1, optim.b2), eps=optim.eps)
