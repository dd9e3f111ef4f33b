"""A LLaMA decoder with the options of the family, and room for QLLaMA's cross-attention.

Layers are scanned in *periods*: one layer that may cross-attend, then the plain ones. A plain LLaMA
is a stack of periods of one layer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.models.compute import Compute
from internvl_jax.nn.attend import Mask
from internvl_jax.nn.attention import CrossAttention, DecoderAttention, KeyValue
from internvl_jax.nn.lora import LoraConfig
from internvl_jax.nn.mlp import SwiGlu
from internvl_jax.nn.norm import RMSNorm
from internvl_jax.nn.param import normal, param
from internvl_jax.nn.regularize import Randomness
from internvl_jax.nn.rope import rope_tables
from internvl_jax.nn.stack import Run, Stack, interleave, scan_layers
from internvl_jax.sharding.rules import constrain, gathered


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a decoder.

    Attributes:
        kv_heads: fewer than `heads` groups the queries; None means as many.
        head_dim: None means width // heads.
        qkv_bias, out_bias: Qwen2 has the first, InternLM both.
        qk_norm: per-head RMSNorm on q and k (Qwen3).
        tied_head: logits use the embedding table.
        head: whether there is an output head at all.
        cross_frequency: every so many layers one that may cross-attend; 0 for a plain LLaMA.
        vision_width: width of the tokens cross-attended to; 0 builds the same layout without the
            cross-attention, as the text tower of stage 1 is.
        pad_id: its embedding receives no gradient, as torch's ``padding_idx``; None for none.
        lora: adapters; where layers cross-attend, of the cross-attention as well.
    """

    vocab_size: int = 49954
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 11008
    eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    head: bool = True
    cross_frequency: int = 0
    vision_width: int = 0
    pad_id: int | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"width={self.width} is not a multiple of heads={self.heads}: set head_dim."
            )
        if self.heads % self.K:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.K}.")
        if self.vision_width and not self.cross_frequency:
            raise ValueError(
                "vision_width is set but cross_frequency is 0: say how often layers cross-attend."
            )
        if self.lora:
            self.lora.check({**self.kernels(), **self.cross_kernels()})

    @property
    def K(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def H(self) -> int:
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def period(self) -> int:
        return max(self.cross_frequency, 1)

    @property
    def cross_layers(self) -> int:
        """How many layers cross-attend: i % cross_frequency == 0."""
        return -(-self.depth // self.cross_frequency) if self.vision_width else 0

    def kernels(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices, as `LoraConfig.targets` names them."""
        D, Q, KV, F = self.width, self.heads * self.H, self.K * self.H, self.mlp_dim
        attn = {"attn/q": (D, Q), "attn/k": (D, KV), "attn/v": (D, KV), "attn/out": (Q, D)}
        return {**attn, "mlp/gate": (D, F), "mlp/up": (D, F), "mlp/down": (F, D)}

    def cross_kernels(self) -> dict[str, tuple[int, int]]:
        """The same of the cross-attention that some layers have."""
        D, Q, V = self.width, self.heads * self.H, self.vision_width
        cross = {"cross/q": (D, Q), "cross/k": (V, Q), "cross/v": (V, Q), "cross/out": (Q, D)}
        return cross if V else {}

    def param_count(self) -> int:
        """Number of parameters, adapters included."""
        D, N, K, H, F = self.width, self.heads, self.K, self.H, self.mlp_dim
        layer = 2 * D * N * H + 2 * D * K * H + 3 * D * F + 2 * D
        layer += (N + 2 * K) * H * self.qkv_bias + D * self.out_bias + 2 * H * self.qk_norm
        cross = 2 * D * N * H + 2 * self.vision_width * N * H + D + self.vision_width
        head = D * self.vocab_size * (self.head and not self.tied_head)
        if self.lora:
            layer += self.lora.param_count(self.kernels())
            cross += self.lora.param_count(self.cross_kernels())
        return self.depth * layer + self.cross_layers * cross + self.vocab_size * D + head + D

    def flops(
        self, tokens: int, *, logits: int = 0, queries: int = 0, vision_tokens: int = 0
    ) -> int:
        """Forward matrix-product FLOPs of one row (2 per multiply-add, full attention square).

        Args:
            tokens: row length, queries included.
            logits: positions whose logits are computed.
            queries: rows that cross-attend (0: no cross-attention).
            vision_tokens: tokens cross-attended to.
        """
        D, N, K, H, F = self.width, self.heads, self.K, self.H, self.mlp_dim
        layer = 2 * tokens * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + 4 * tokens**2 * N * H
        cross = 0
        if queries:
            cross = 2 * (queries * 2 * D * N * H + vision_tokens * 2 * self.vision_width * N * H)
            cross += 4 * queries * vision_tokens * N * H
        return self.depth * layer + self.cross_layers * cross + 2 * logits * D * self.vocab_size


class DecoderLayer(nnx.Module):
    """Self-attention, then cross-attention for the query rows, then the feed-forward block."""

    def __init__(self, cfg: LlamaConfig, compute: Compute, *, cross: bool, rngs: nnx.Rngs):
        std = 0.02 * (3200 / cfg.width) ** 0.5
        init, out_init = normal(std), normal(std * (2 * cfg.depth) ** -0.5)
        self.norm1 = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.attn = DecoderAttention(
            cfg.width,
            cfg.heads,
            cfg.K,
            cfg.H,
            qkv_bias=cfg.qkv_bias,
            out_bias=cfg.out_bias,
            qk_norm=cfg.qk_norm,
            eps=cfg.eps,
            rngs=rngs,
            init=init,
            out_init=out_init,
            implementation=compute.attention,
            lora=cfg.lora,
        )
        make_cross = functools.partial(
            CrossAttention, eps=cfg.eps, init=init, out_init=out_init, lora=cfg.lora
        )
        self.cross = (
            make_cross(cfg.width, cfg.heads, cfg.H, cfg.vision_width, rngs=rngs) if cross else None
        )
        self.norm2 = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        self.mlp = SwiGlu(
            cfg.width, cfg.mlp_dim, rngs=rngs, init=init, out_init=out_init, lora=cfg.lora
        )

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: Mask | jax.Array,
        vision: jax.Array | None,
        queries: int,
        cache: KeyValue | None,
        random: Randomness | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        y, kv = self.attn(self.norm1(x), rope, mask, cache, random)
        x = x + y
        if self.cross is not None and vision is not None and queries:
            rows = x[:, :queries]
            x = jnp.concatenate([rows + self.cross(rows, vision, random), x[:, queries:]], axis=1)
        x = checkpoint_name(x, "mid")
        x = x + self.mlp(self.norm2(x), random)
        return constrain(x, "batch", None, None), kv


class Period(nnx.Module):
    """`first` may cross-attend, the layers of `rest` never do."""

    def __init__(self, cfg: LlamaConfig, compute: Compute, length: int, *, rngs: nnx.Rngs):
        self.first = DecoderLayer(cfg, compute, cross=cfg.vision_width > 0, rngs=rngs)
        make_plain = functools.partial(DecoderLayer, cfg, compute, cross=False)
        self.rest = nnx.List(make_plain(rngs=rngs) for _ in range(length - 1))

    @property
    def layers(self) -> list[DecoderLayer]:
        return [self.first, *self.rest]


class LlamaOutput(NamedTuple):
    """hidden [B, T, D] after the final norm; keys and values [L, B, T, K, H] of the new tokens;
    layers [L, B, T, D], every layer's output before the final norm, where asked for."""

    hidden: jax.Array
    kv: KeyValue
    layers: jax.Array | None


class Llama(nnx.Module):
    """Token embedding, periods of decoder layers, final norm, output head."""

    def __init__(self, cfg: LlamaConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        whole, tail = divmod(cfg.depth, cfg.period)
        self.embedding = param(rngs, (cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(0.02))
        make_period = functools.partial(Period, cfg, compute, cfg.period)
        self.periods = Stack(make_period, whole, rngs=rngs) if whole else None
        self.tail = Period(cfg, compute, tail, rngs=rngs) if tail else None
        self.norm = RMSNorm(cfg.width, eps=cfg.eps, rngs=rngs)
        head = cfg.head and not cfg.tied_head
        shape, axes = (cfg.width, cfg.vocab_size), ("embed", "vocab")
        self.lm_head = param(rngs, shape, axes, normal(0.02)) if head else None

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [B, T] -> [B, T, D] in the compute dtype."""
        # Whole on every device first: a lookup in a sharded table is worse than gathering it.
        table = self._whole(self.embedding, "vocab", "embed")
        x = jnp.take(table, ids, axis=0)
        if self.cfg.pad_id is not None:
            x = jnp.where((ids == self.cfg.pad_id)[..., None], jax.lax.stop_gradient(x), x)
        return constrain(x, "batch", None, None)

    def _whole(self, matrix: nnx.Param, *axes: str) -> jax.Array:
        return gathered(matrix[...].astype(self.compute.jnp_dtype), axes, padded=False)

    def head_kernel(self) -> jax.Array:
        """The [D, V] matrix from final hidden states to logits, whole, in the compute dtype."""
        if self.lm_head is not None:
            return self._whole(self.lm_head, "embed", "vocab")
        if self.cfg.tied_head:
            return self._whole(self.embedding, "vocab", "embed").T
        raise ValueError(
            "This decoder was built without an output head (head=False): it has no logits."
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        kernel = self.head_kernel()
        return jnp.einsum("...D,DV->...V", hidden, kernel, preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: Mask | jax.Array,
        *,
        vision: jax.Array | None = None,
        queries: int = 0,
        cache: KeyValue | None = None,
        collect: bool = False,
        random: Randomness | None = None,
    ) -> LlamaOutput:
        """Runs the decoder on embeddings.

        Args:
            x: [R, T, D] embeddings; with `vision`, R/B consecutive rows belong to one image.
            positions: [R, T] for RoPE.
            mask: a rule, or bool [R|1, T, S + T], True where attention is allowed, keys of the
                cache first.
            vision: [B, P, Dv] tokens for the cross-attention.
            queries: the first so many positions of each row cross-attend.
            cache: keys and values [L, R, S, K, H] of earlier tokens; read only.
            collect: return every layer's output too.
            random: of the R rows, turns the adapters' dropout on; None is deterministic.
        """
        cfg = self.cfg
        keys = None
        if random is not None and cfg.lora and cfg.lora.dropout:
            keys = jax.vmap(lambda i: jax.random.fold_in(random.key, i))(jnp.arange(cfg.depth))
        extra = (cache, keys)  # per layer
        rope = rope_tables(positions, cfg.H, cfg.rope_theta)
        x = x.astype(self.compute.jnp_dtype)
        options: dict[str, Any] = dict(
            remat=self.compute.remat, dtype=self.compute.jnp_dtype, unroll=self.compute.unroll
        )

        def one(layer: DecoderLayer, x: jax.Array, extra: Any, run: Run):
            cache, key = extra
            here = None if random is None or key is None else Randomness(key, random.example)
            call = lambda layer, x: layer(x, rope, mask, vision, queries, cache, here)
            x, kv = run(layer, call, x)
            return x, (kv, x if collect else None)

        def several(period: Period, x: jax.Array, extra: Any, run: Run):
            outs = []
            for i, layer in enumerate(period.layers):
                x, out = one(layer, x, jax.tree.map(lambda c: c[i], extra), run)  # noqa: B023
                outs.append(out)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)

        if not cfg.vision_width:
            whole: Any = None if self.periods is None else self.periods.layers
            layers = interleave(
                [] if whole is None else whole.layers,
                [] if self.tail is None else self.tail.layers,
            )
            x, (kv, outs), _ = scan_layers(layers, cfg.depth, one, x, extra, **options)
            return LlamaOutput(self.norm(x), kv, outs)

        whole, k = cfg.depth // cfg.period, cfg.period
        parts = []
        if self.periods is not None:
            here = jax.tree.map(lambda c: c[: whole * k].reshape(whole, k, *c.shape[1:]), extra)
            x, out, _ = self.periods(several, x, here, **options)
            parts.append(jax.tree.map(lambda a: a.reshape(whole * k, *a.shape[2:]), out))
        if self.tail is not None:
            rest = jax.tree.map(lambda c: c[whole * k :], extra)
            # Less than a period: everything is kept, there is little.
            x, out = several(self.tail, x, rest, Run(dtype=self.compute.jnp_dtype))
            parts.append(out)
        kv, layers = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
        return LlamaOutput(self.norm(x), kv, layers)
