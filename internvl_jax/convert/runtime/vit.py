"""InternViT (https://arxiv.org/abs/2312.14238, section 3.2): patches, CLS, positions, blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VitConfig


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """``rms`` or ``layer``."""
    return nn.RMSNorm(width, eps) if kind == "rms" else nn.LayerNorm(width, eps)


class VitAttention(nn.Module):
    """Full self-attention with a fused qkv projection and optional full-width QK-norm."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        D = cfg.width
        self.heads = cfg.heads
        self.qkv = nn.Linear(D, 3 * D, bias=cfg.qkv_bias)
        self.q_norm = nn.RMSNorm(D, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(D, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, P, H]
            for t in (self.q_norm(q), self.k_norm(k), v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x += ls1 * attn(norm1 x); x += ls2 * mlp(norm2 x)."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        self.norm1 = make_norm(cfg.norm, cfg.width, cfg.eps)
        self.attn = VitAttention(cfg)
        self.ls1 = nn.Parameter(torch.empty(cfg.width))
        self.norm2 = make_norm(cfg.norm, cfg.width, cfg.eps)
        self.mlp = Mlp(cfg.width, cfg.mlp_dim)
        self.ls2 = nn.Parameter(torch.empty(cfg.width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.ls1, self.attn(self.norm1(x)))
        return torch.addcmul(x, self.ls2, self.mlp(self.norm2(x)))


class Embeddings(nn.Module):
    """Patches as one matrix product, CLS in front, positions added."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        p, D = cfg.patch_size, cfg.width
        self.patch_embedding = nn.Conv2d(3, D, p, stride=p)  # its weights; see forward
        self.class_embedding = nn.Parameter(torch.empty(1, 1, D))
        table = 1 + (cfg.image_size // p) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, table, D))

    def forward(self, images: Tensor) -> Tensor:
        weight = self.patch_embedding.weight
        D, _, p, _ = weight.shape
        B, height, width, _ = images.shape
        grid = height // p, width // p
        x = images.to(weight.dtype).reshape(B, grid[0], p, grid[1], p, 3)
        x = x.permute(0, 1, 3, 5, 2, 4).reshape(B, grid[0] * grid[1], 3 * p * p)
        x = F.linear(x, weight.reshape(D, -1), self.patch_embedding.bias)
        return torch.cat([self.class_embedding.expand(B, 1, D), x], dim=1) + self.positions(grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table for rows x columns of patches, [1, 1 + rows * columns, D]."""
        table = self.position_embedding
        side = round((table.shape[1] - 1) ** 0.5)
        if grid == (side, side):
            return table
        square = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        resized = square.flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([table[:, :1], resized], dim=1)


class InternViT(nn.Module):
    """The vision tower; no norm after the last block, no head."""

    def __init__(self, cfg: VitConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = Embeddings(cfg)
        layers = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, images: Tensor, layer: int = -1, last: bool = True) -> tuple[Tensor, Tensor]:
        """Encodes pictures.

        Args:
            images: [B, h, w, 3], normalised; other sizes than the native one interpolate the table.
            layer: whose output is asked for as well, from the end: -1 is the last block's.
            last: run the blocks after it, too.

        Returns:
            [B, P, D] of the last block that ran, and of the asked one; CLS first.
        """
        x = self.embeddings(images)
        tapped, wanted = x, self.cfg.depth + layer
        layers: Any = self.encoder["layers"]
        for i, block in enumerate(layers):
            x = block(x)
            if i == wanted:
                tapped = x
                if not last:
                    break
        return x, tapped
