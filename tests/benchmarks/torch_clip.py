"""InternVL-C in compact PyTorch, as the counterpart of the speed comparisons.

The same function as `models.internvl` of stage 1: the tests copy our parameters into it and compare
losses and gradients. Written the way PyTorch is fastest: fused qkv, its own attention and fused
AdamW; a causal mask alone, since right padding stands after the one row that is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internvl_jax.batch import MEAN, STD
from internvl_jax.models.internvl import InternVLConfig


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, N*H] -> [B, N, T, H]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, N, T, H] -> [B, T, N*H]."""
    return x.transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """[B, N, T, H] each -> [B, T, N*H]."""
    return merged(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


class RMSNorm(nn.RMSNorm):
    """PyTorch's, fused under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class VitBlock(nn.Module):
    """InternViT's layer."""

    def __init__(self, width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (RMSNorm(width, eps=eps) for _ in range(2))
        self.q_norm, self.k_norm = (RMSNorm(width, eps=eps) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (heads(t, self.heads) for t in (self.q_norm(q), self.k_norm(k), v))
        x = x + self.ls1 * self.out(attention(q, k, v))
        return x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class LlamaLayer(nn.Module):
    """LLaMA's layer."""

    def __init__(self, width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (RMSNorm(width, eps=eps) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (heads(t, self.heads) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(attention(rotate(q, rope), rotate(k, rope), v, causal=True))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, H] of the positions 0, 1, ..., each half the same."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x[i], x[i + H/2]) of [B, N, T, H]."""
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]


class Pool(nn.Module):
    """The clip_projector: the mean of all tokens attends to them."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.norm_q(x.mean(1, keepdim=True)))
        k, v = self.k(self.norm_k(x)), self.v(self.norm_v(x))
        q, k, v = (heads(t, self.heads) for t in (q, k, v))
        return self.out(attention(q, k, v))[:, 0]


class TorchClip(nn.Module):
    """The two towers, the pool and the temperature."""

    cos: Tensor
    sin: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, cfg: InternVLConfig, text_length: int):
        super().__init__()
        v, t = cfg.vision, cfg.qllama
        self.patch = nn.Conv2d(3, v.width, v.patch_size, v.patch_size)
        self.cls = nn.Parameter(torch.empty(v.width))
        self.pos = nn.Parameter(torch.empty(1 + v.grid**2, v.width))
        self.vision = nn.ModuleList(
            VitBlock(v.width, v.heads, v.mlp_dim, v.eps) for _ in range(v.depth)
        )
        self.pool = Pool(v.width, cfg.pool_heads, cfg.embed_dim)
        self.embedding = nn.Embedding(t.vocab_size, t.width)
        self.text = nn.ModuleList(
            LlamaLayer(t.width, t.heads, t.mlp_dim, t.eps) for _ in range(t.depth)
        )
        self.norm = RMSNorm(t.width, eps=t.eps)
        self.text_projection = nn.Parameter(torch.empty(t.width, cfg.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(cfg.logit_scale))
        cos, sin = rope_tables(text_length, t.H, t.rope_theta)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        mean, std = (255 * torch.tensor(m).view(3, 1, 1) for m in (MEAN, STD))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def embed_images(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """uint8 [B, S, S, 3] -> [B, E]; `kept` [B, K] are the patches that are not masked."""
        x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos[1:]
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls + self.pos[0]).expand(len(x), 1, -1), x], 1)
        for block in self.vision:
            x = block(x)
        return self.pool(x)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T], padded on the right -> [B, E]."""
        x = self.embedding(ids)
        for layer in self.text:
            x = layer(x, (self.cos, self.sin))
        last = (mask.sum(1) - 1).clamp(min=0)
        return self.norm(x)[torch.arange(len(x)), last] @ self.text_projection

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """The symmetric contrastive loss."""
        image = F.normalize(self.embed_images(images, kept), dim=-1)
        text = F.normalize(self.embed_texts(ids, mask), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def copy_from(self, flat: Mapping[str, Any]) -> None:
        """Takes our parameters, path -> array."""
        with torch.no_grad():
            for name, value in self.translated(flat).items():
                self.get_parameter(name).copy_(torch.from_numpy(value))

    def translated(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Our parameters, or gradients, under the names and in the shapes of this module."""
        ours = {path: np.array(value) for path, value in flat.items()}
        width = ours["vision/cls"].shape[0]
        out = {
            "patch.weight": ours["vision/patch/kernel"].transpose(3, 2, 0, 1),
            "patch.bias": ours["vision/patch/bias"],
            "cls": ours["vision/cls"],
            "pos": ours["vision/pos"],
            "embedding.weight": ours["qllama/embedding"],
            "norm.weight": ours["qllama/norm/scale"],
            "text_projection": ours["text_projection"],
            "logit_scale": ours["logit_scale"],
            "pool.out.weight": ours["clip_projector/out"].reshape(width, -1).T,
            "pool.out.bias": ours["clip_projector/out_bias"],
        }
        for part in "qkv":
            at = f"clip_projector/{part}"
            out[f"pool.{part}.weight"] = ours[at].reshape(width, width).T
            out[f"pool.{part}.bias"] = ours[f"{at}_bias"].reshape(-1)
            out[f"pool.norm_{part}.weight"] = ours[f"clip_projector/norm_{part}/scale"]
            out[f"pool.norm_{part}.bias"] = ours[f"clip_projector/norm_{part}/bias"]
        for i in range(len(self.vision)):
            out |= vit_layer(
                {
                    path.removeprefix("vision/blocks/layers/"): value[i]
                    for path, value in ours.items()
                    if path.startswith("vision/blocks/layers/")
                },
                f"vision.{i}.",
            )
        for i in range(len(self.text)):
            out |= llama_layer(
                {
                    path.removeprefix("qllama/periods/layers/first/"): value[i]
                    for path, value in ours.items()
                    if path.startswith("qllama/periods/layers/first/")
                },
                f"text.{i}.",
            )
        return {name: value.copy() for name, value in out.items()}


def vit_layer(ours: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """One layer of our InternViT under the names of `VitBlock`."""
    width = ours["ls1"].shape[0]
    out = {
        "norm1.weight": ours["norm1/scale"],
        "norm2.weight": ours["norm2/scale"],
        "q_norm.weight": ours["attn/q_norm/scale"].reshape(-1),
        "k_norm.weight": ours["attn/k_norm/scale"].reshape(-1),
        "qkv.weight": ours["attn/qkv"].reshape(width, -1).T,
        "out.weight": ours["attn/out"].reshape(width, width).T,
        "out.bias": ours["attn/out_bias"],
        "fc1.weight": ours["mlp/fc1"].T,
        "fc1.bias": ours["mlp/fc1_bias"],
        "fc2.weight": ours["mlp/fc2"].T,
        "fc2.bias": ours["mlp/fc2_bias"],
        "ls1": ours["ls1"],
        "ls2": ours["ls2"],
    }
    return {prefix + name: value for name, value in out.items()}


def llama_layer(ours: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """One layer of our decoder under the names of `LlamaLayer`."""
    width = ours["norm1/scale"].shape[0]
    qkv = np.concatenate([ours[f"attn/{part}"].reshape(width, -1) for part in "qkv"], 1)
    out = {
        "norm1.weight": ours["norm1/scale"],
        "norm2.weight": ours["norm2/scale"],
        "qkv.weight": qkv.T,
        "out.weight": ours["attn/out"].reshape(-1, width).T,
        "gate.weight": ours["mlp/gate"].T,
        "up.weight": ours["mlp/up"].T,
        "down.weight": ours["mlp/down"].T,
    }
    return {prefix + name: value for name, value in out.items()}


def random_patches(batch: int, patches: int, keep: float) -> Tensor | None:
    """Which patches an image keeps, [B, K]; None for all."""
    if keep == 1:
        return None
    return torch.rand(batch, patches).topk(max(1, round(keep * patches))).indices


def adamw(model: nn.Module, *, weight_decay: float, b2: float) -> torch.optim.Optimizer:
    """Fused AdamW; biases, norms and scales do not decay."""
    bare = [p for p in model.parameters() if p.ndim < 2]
    rest = [p for p in model.parameters() if p.ndim >= 2]
    groups = [dict(params=bare, weight_decay=0.0), dict(params=rest, weight_decay=weight_decay)]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, b2), fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine to 0, as `train.optimizer`."""
    ramp = round(warmup * steps)
    progress = min(max((step - ramp) / max(steps - ramp, 1), 0.0), 1.0)
    return peak * min((step + 1) / max(ramp, 1), 1.0) * 0.5 * (1 + math.cos(math.pi * progress))
