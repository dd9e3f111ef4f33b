"""Attention modules: ViT, decoder, cross. Their numeric core is `nn.attend`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.nn.attend import Mask, attend, rotates
from internvl_jax.nn.dense import dense
from internvl_jax.nn.lora import LoraConfig, adapted, adapter
from internvl_jax.nn.norm import RMSNorm
from internvl_jax.nn.param import Initializer, param, zeros
from internvl_jax.nn.regularize import Randomness
from internvl_jax.nn.rope import apply_rope
from internvl_jax.sharding.rules import constrain

KeyValue = tuple[jax.Array, jax.Array]


class VitAttention(nnx.Module):
    """Full self-attention with a fused qkv projection and optional full-width QK-norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool,
        qk_norm: bool,
        eps: float,
        rngs: nnx.Rngs,
        init: Initializer,
        out_init: Initializer,
        implementation: str = "auto",
        lora: LoraConfig | None = None,
    ):
        H = width // heads
        self.implementation = implementation
        axes = ("vit_heads", "head_dim")
        self.qkv = param(rngs, (width, 3, heads, H), ("embed", None, *axes), init)
        self.qkv_bias = param(rngs, (3, heads, H), (None, *axes), zeros) if qkv_bias else None
        self.q_norm = RMSNorm((heads, H), eps=eps, axes=axes, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm((heads, H), eps=eps, axes=axes, rngs=rngs) if qk_norm else None
        self.out = param(rngs, (heads, H, width), (*axes, "embed"), out_init)
        self.out_bias = param(rngs, (width,), ("embed",), zeros)
        self.qkv_lora = adapter(lora, "attn/qkv", self.qkv, rngs=rngs)
        self.out_lora = adapter(lora, "attn/out", self.out, contract=2, rngs=rngs)

    def project(
        self, x: jax.Array, random: Randomness | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, P, D] -> q, k, v, each [B, P, N, H], before QK-norm."""
        kernel = self.qkv[...].astype(x.dtype)
        lora = self.qkv_lora
        low = None if lora is None else lora.down(x, random)
        bias = None if self.qkv_bias is None else self.qkv_bias[...].astype(x.dtype)

        def one(i: int) -> jax.Array:
            y = dense(x, kernel[:, i])
            if lora is not None and low is not None:
                y = y + dense(low, lora.b[...][:, i])
            return checkpoint_name(y if bias is None else y + bias[i], "qkv")

        # Three products: a fused one leaves its result transposed, which costs more than it saves.
        q, k, v = (one(i) for i in range(3))
        return q, k, v

    def context(self, x: jax.Array, random: Randomness | None = None) -> jax.Array:
        """[B, P, D] -> attention output before the projection, [B, P, N, H]."""
        q, k, v = self.project(x, random)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        q, k, v = (constrain(t, "batch", None, "heads", None) for t in (q, k, v))
        return attend(q, k, v, implementation=self.implementation)

    def __call__(
        self,
        x: jax.Array,
        gain: jax.Array | None = None,
        random: Randomness | None = None,
    ) -> jax.Array:
        """Applies the block; `gain` is LayerScale, folded as in `nn.mlp.Mlp`; `random` as there."""
        kernel, bias = self.out[...], self.out_bias[...]
        if gain is not None:
            kernel, bias = kernel.astype(jnp.float32) * gain, bias * gain
        x = self.context(x, random)
        y = adapted(x, kernel, self.out_lora, random, contract=2, gain=gain)
        return y + bias.astype(x.dtype)


class DecoderAttention(nnx.Module):
    """Causal-decoder self-attention with the LLaMA family's options.

    Grouped queries, biases on q, k, v (Qwen2) or q, k, v, o (InternLM), per-head q/k-norm (Qwen3).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: bool,
        eps: float,
        rngs: nnx.Rngs,
        init: Initializer,
        out_init: Initializer,
        implementation: str = "auto",
        lora: LoraConfig | None = None,
    ):
        self.implementation = implementation
        D, N, K, H = width, heads, kv_heads, head_dim
        self.q = param(rngs, (D, N, H), ("embed", "heads", "head_dim"), init)
        self.k = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), init)
        self.v = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), init)
        self.out = param(rngs, (N, H, D), ("heads", "head_dim", "embed"), out_init)
        self.q_bias = param(rngs, (N, H), ("heads", "head_dim"), zeros) if qkv_bias else None
        self.k_bias = param(rngs, (K, H), ("kv_heads", "head_dim"), zeros) if qkv_bias else None
        self.v_bias = param(rngs, (K, H), ("kv_heads", "head_dim"), zeros) if qkv_bias else None
        self.out_bias = param(rngs, (D,), ("embed",), zeros) if out_bias else None
        self.q_norm = RMSNorm(H, eps=eps, axes=("head_dim",), rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(H, eps=eps, axes=("head_dim",), rngs=rngs) if qk_norm else None
        self.q_lora = adapter(lora, "attn/q", self.q, rngs=rngs)
        self.k_lora = adapter(lora, "attn/k", self.k, rngs=rngs)
        self.v_lora = adapter(lora, "attn/v", self.v, rngs=rngs)
        self.out_lora = adapter(lora, "attn/out", self.out, contract=2, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: Mask | jax.Array,
        cache: KeyValue | None = None,
        random: Randomness | None = None,
    ) -> tuple[jax.Array, KeyValue]:
        """Attends over the cache (if any) followed by x itself.

        Args:
            x: [B, T, D].
            rope: tables of x's positions.
            mask: a rule, or bool [B|1, T, S + T], keys of the cache first.
            cache: rotated keys and values [B, S, K, H] of earlier tokens; read, never written.
            random: the layer's, for the adapters' dropout.

        Returns:
            [B, T, D] and x's own keys and values [B, T, K, H].
        """
        q, k, v = (
            _with_bias(adapted(x, w[...], lora, random), b)
            for w, b, lora in (
                (self.q, self.q_bias, self.q_lora),
                (self.k, self.k_bias, self.k_lora),
                (self.v, self.v_bias, self.v_lora),
            )
        )
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        inside = cache is None and rotates(q, k, mask, self.implementation)
        if not inside:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q = constrain(q, "batch", None, "heads", None)
        k = constrain(k, "batch", None, "kv_heads", None)
        v = constrain(v, "batch", None, "kv_heads", None)
        q, k, v = (checkpoint_name(t, "qkv") for t in (q, k, v))
        keys, values = k, v
        if cache is not None:
            keys = jnp.concatenate([cache[0].astype(k.dtype), k], axis=1)
            values = jnp.concatenate([cache[1].astype(v.dtype), v], axis=1)
        y = attend(q, keys, values, mask, self.implementation, rope if inside else None)
        if inside:
            k = apply_rope(k, rope)  # for a cache; costs nothing where there is none to fill
        y = adapted(y, self.out[...], self.out_lora, random, contract=2)
        return _with_bias(y, self.out_bias), (k, v)


class CrossAttention(nnx.Module):
    """QLLaMA's cross-attention: queries read the vision tokens; no mask, no RoPE, no gate.

    Both sides have their own RMSNorm inside the block (https://arxiv.org/abs/2312.14238, 3.2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        vision_width: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        init: Initializer,
        out_init: Initializer,
        lora: LoraConfig | None = None,
    ):
        D, N, H = width, heads, head_dim
        self.norm1 = RMSNorm(D, eps=eps, rngs=rngs)
        self.norm2 = RMSNorm(vision_width, eps=eps, rngs=rngs)
        self.q = param(rngs, (D, N, H), ("embed", "heads", "head_dim"), init)
        self.k = param(rngs, (vision_width, N, H), ("embed", "heads", "head_dim"), init)
        self.v = param(rngs, (vision_width, N, H), ("embed", "heads", "head_dim"), init)
        self.out = param(rngs, (N, H, D), ("heads", "head_dim", "embed"), out_init)
        self.q_lora = adapter(lora, "cross/q", self.q, rngs=rngs)
        self.k_lora = adapter(lora, "cross/k", self.k, rngs=rngs)
        self.v_lora = adapter(lora, "cross/v", self.v, rngs=rngs)
        self.out_lora = adapter(lora, "cross/out", self.out, contract=2, rngs=rngs)

    def __call__(
        self, x: jax.Array, vision: jax.Array, random: Randomness | None = None
    ) -> jax.Array:
        """Args: x [R*B, Q, D], R consecutive rows per image; vision [B, P, Dv]; random of the rows.

        Returns like x.
        """
        rows, Q, D = x.shape
        B = vision.shape[0]
        dtype = x.dtype
        # The R rows of one image share its keys: they are simply more queries of that image.
        x = self.norm1(x).reshape(B, rows // B * Q, D)
        vision = self.norm2(vision.astype(dtype))
        if random is not None:
            random = Randomness(random.key, random.example.reshape(B, -1)[:, 0])
        q = adapted(x, self.q[...], self.q_lora, random)
        k = adapted(vision, self.k[...], self.k_lora, random)
        v = adapted(vision, self.v[...], self.v_lora, random)
        q, k, v = (constrain(t, "batch", None, "heads", None) for t in (q, k, v))
        y = attend(q, k, v)
        y = adapted(y, self.out[...], self.out_lora, random, contract=2)
        return y.reshape(rows, Q, D)


def _with_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + bias[...].astype(x.dtype)
