"""Attention pooling: one query, the mean of all tokens, reads the tokens (paper, section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.nn.attend import attend
from internvl_jax.nn.dense import dense
from internvl_jax.nn.norm import LayerNorm
from internvl_jax.nn.param import kernel_init, param, zeros
from internvl_jax.sharding.rules import constrain, gathered


class AttentionPool(nnx.Module):
    """The ``clip_projector``: three LayerNorms, one cross-attention, an output projection.

    The query is the mean over all tokens, CLS included. `k_bias` and the key norm's bias shift all
    keys alike, so the softmax cancels them: they are kept for the sake of conversion.
    """

    def __init__(self, width: int, heads: int, out: int, *, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(
                f"Attention pooling of width {width} does not split into {heads} heads."
            )
        D, N, H, init = width, heads, width // heads, kernel_init(width)
        axes = ("pool_heads", "head_dim")
        self.norm_q, self.norm_k, self.norm_v = (
            LayerNorm(D, eps=1e-5, rngs=rngs) for _ in range(3)
        )
        self.q, self.k, self.v = (param(rngs, (D, N, H), ("embed", *axes), init) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (param(rngs, (N, H), axes, zeros) for _ in range(3))
        self.out = param(rngs, (N, H, out), (*axes, "contrastive"), init)
        self.out_bias = param(rngs, (out,), ("contrastive",), zeros)

    def context(self, tokens: jax.Array) -> jax.Array:
        """[B, P, D] -> what the query read, before the projection, [B, 1, N, H]."""
        dtype = tokens.dtype
        mean = jnp.mean(tokens.astype(jnp.float32), axis=1, keepdims=True).astype(dtype)
        axes = ("embed", None, None)
        whole = lambda w: gathered(w[...].astype(dtype), axes, padded=False)
        q, k, v = (
            dense(constrain(norm(x), "batch", None, None), whole(w)) + b[...].astype(dtype)
            for norm, x, w, b in (
                (self.norm_q, mean, self.q, self.q_bias),
                (self.norm_k, tokens, self.k, self.k_bias),
                (self.norm_v, tokens, self.v, self.v_bias),
            )
        )
        return attend(q, k, v)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, P, D] -> float32 [B, E]."""
        y = jnp.einsum(
            "BPNH,NHE->BPE",
            self.context(tokens),
            self.out[...].astype(tokens.dtype),
            preferred_element_type=jnp.float32,
        )
        return y[:, 0] + self.out_bias[...].astype(jnp.float32)


def pool_param_count(width: int, out: int) -> int:
    """Parameters of an `AttentionPool`."""
    return 3 * (2 * width + width * width + width) + width * out + out
