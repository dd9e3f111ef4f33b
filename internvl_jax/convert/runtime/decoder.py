"""A LLaMA decoder with the options of the family, and QLLaMA's cross-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DecoderConfig

Rope = tuple[Tensor, Tensor]
Slots = tuple[Tensor, Tensor]
"""One layer's keys and values, [B, K, S, H] each, written in place."""


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """Cosines and sines of positions [B, T], float32 [B, 1, T, H/2] each."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None, :, None] * theta ** (-steps / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates the pairs (x[i], x[i + H/2]) of [B, N, T, H]."""
    cos, sin = (t.to(x.dtype) for t in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention with grouped queries.

    Args:
        q: [B, N, T, H].
        k, v: [B, K, S, H], N a multiple of K.
        mask: bool, broadcastable to [B, N, T, S], True where attention is allowed; or None.
        causal: no query sees later keys (without a mask, T = S).

    Returns:
        [B, T, N * H].
    """
    B, N, T, H = q.shape
    K = k.shape[1]
    if N != K and T == 1:  # a group's heads are as good as so many queries: nothing is repeated
        q = q.reshape(B, K, N // K, H)
    elif N != K:
        k, v = (t.repeat_interleave(N // K, dim=1) for t in (k, v))
    causal = causal and T > 1
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.reshape(B, N, T, H).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention: grouped queries, biases, per-head q/k-norm where the config has them."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        D, H = cfg.width, cfg.head_dim
        self.head_dim = H
        self.q_proj = nn.Linear(D, cfg.heads * H, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(D, cfg.kv_heads * H, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(D, cfg.kv_heads * H, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.heads * H, D, bias=cfg.out_bias)
        self.q_norm = nn.RMSNorm(H, cfg.eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(H, cfg.eps) if cfg.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        causal: bool,
        slots: Slots | None,
        at: Tensor | None,
    ) -> Tensor:
        split = lambda y: y.unflatten(-1, (-1, self.head_dim))
        q, k = self.q_norm(split(self.q_proj(x))), self.k_norm(split(self.k_proj(x)))
        v = split(self.v_proj(x))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N, T, H]
        q, k = rotate(q, rope), rotate(k, rope)
        if slots is not None and at is not None:
            keys, values = slots
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            seen = x.shape[1] if mask is None else mask.shape[-1]
            k, v = keys[:, :, :seen], values[:, :, :seen]
        return self.o_proj(attend(q, k, v, mask, causal))


class CrossAttention(nn.Module):
    """Queries read the vision tokens; no mask, no RoPE, no gate, a norm for each side."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        D, V, inner = cfg.width, cfg.vision_width, cfg.heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(D, cfg.eps), nn.RMSNorm(V, cfg.eps)
        self.q_proj = nn.Linear(D, inner, bias=False)
        self.k_proj = nn.Linear(V, inner, bias=False)
        self.v_proj = nn.Linear(V, inner, bias=False)
        self.o_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor, vision: Tensor) -> Tensor:
        """x [R * B, Q, D], R consecutive rows per picture; vision [B, P, Dv]. Returns like x."""
        split = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        # The R rows of one picture share its keys: they are simply more queries of it.
        q = split(self.q_proj(self.norm1(x)).reshape(vision.shape[0], -1, self.q_proj.out_features))
        vision = self.norm2(vision)
        y = attend(q, split(self.k_proj(vision)), split(self.v_proj(vision)), None, False)
        return self.o_proj(y).reshape(x.shape)


class SwiGlu(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Self-attention, cross-attention for the query rows where there is one, feed-forward."""

    def __init__(self, cfg: DecoderConfig, cross: bool):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg)
        self.cross_attn = CrossAttention(cfg) if cross else None
        self.post_attention_layernorm = nn.RMSNorm(cfg.width, cfg.eps)
        self.mlp = SwiGlu(cfg.width, cfg.mlp_dim)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        causal: bool,
        vision: Tensor | None,
        queries: int,
        slots: Slots | None,
        at: Tensor | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, causal, slots, at)
        if self.cross_attn is not None and vision is not None:
            rows = x[:, :queries]
            x = torch.cat([rows + self.cross_attn(rows, vision), x[:, queries:]], dim=1)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, layers, final norm, output head."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        crosses = lambda i: cfg.vision_width > 0 and i % cfg.cross_frequency == 0
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.width),
                "layers": nn.ModuleList(Layer(cfg, crosses(i)) for i in range(cfg.depth)),
                "norm": nn.RMSNorm(cfg.width, cfg.eps),
            }
        )
        head = cfg.head and not cfg.tied_head
        self.lm_head = nn.Linear(cfg.width, cfg.vocab_size, bias=False) if head else None

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        return self.model["embed_tokens"](ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> float32 [..., V]."""
        head: Any = self.model["embed_tokens"] if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight).float()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        vision: Tensor | None = None,
        queries: int = 0,
        cache: list[Slots] | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Runs the decoder on embeddings.

        Args:
            x: [R, T, D]; with `vision`, R/B consecutive rows belong to one picture.
            positions: [R, T] for RoPE; 0, 1, 2, … by default.
            mask: bool, broadcastable to [R, 1, T, S], True where attention is allowed; keys are the
                first S slots of the cache, or x itself without one. None allows everything.
            causal: instead of a mask: no position sees a later one of x.
            vision: [B, P, Dv] for the cross-attention.
            queries: the first so many positions of each row cross-attend.
            cache: every layer's keys and values; those of x are written to its slots `at`.
            at: int64 [T].

        Returns:
            [R, T, D] after the final norm.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rope = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)
        layers: Any = self.model["layers"]
        for i, layer in enumerate(layers):
            slots = None if cache is None else cache[i]
            x = layer(x, rope, mask, causal, vision, queries, slots, at)
        return self.model["norm"](x)

    def step(
        self, ids: Tensor, positions: Tensor, mask: Tensor, cache: list[Slots], at: Tensor
    ) -> Tensor:
        """One token per row.

        Args:
            ids, positions: [R] int64.
            mask: bool [R, S] over the cache's first S slots, True at tokens, this one included.
            cache: written at the slot `at`.
            at: int64 [1].

        Returns:
            float32 logits [R, V] of the next token.
        """
        x = self.embed(ids[:, None])
        hidden = self(x, positions[:, None], mask[:, None, None], cache=cache, at=at)
        return self.logits(hidden[:, 0])
