"""Feed-forward blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.nn.dense import dense
from internvl_jax.nn.param import Initializer, kernel_init, param, zeros
from internvl_jax.sharding.rules import constrain


class Mlp(nnx.Module):
    """Linear, exact (erf) GELU, linear, with biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int | None = None,
        *,
        rngs: nnx.Rngs,
        init: Initializer | None = None,
        out_init: Initializer | None = None,
    ):
        out = width if out is None else out
        init = init or kernel_init(width)
        self.fc1 = param(rngs, (width, hidden), ("embed", "mlp"), init)
        self.fc1_bias = param(rngs, (hidden,), ("mlp",), zeros)
        self.fc2 = param(rngs, (hidden, out), ("mlp", "embed"), out_init or init)
        self.fc2_bias = param(rngs, (out,), ("embed",), zeros)

    def hidden(self, x: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, F] after the activation."""
        h = dense(x, self.fc1[...])
        h = checkpoint_name(h + self.fc1_bias[...].astype(x.dtype), "fc1")
        return jax.nn.gelu(h, approximate=False)

    def __call__(self, x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
        """Applies the block.

        Args:
            x: [..., D].
            gain: per-channel LayerScale [D], folded into the second matrix: the same function,
                but its gradient does not need the block's output to be kept or recomputed.
        """
        kernel, bias = self.fc2[...], self.fc2_bias[...]
        if gain is not None:
            kernel, bias = kernel.astype(jnp.float32) * gain, bias * gain
        y = dense(self.hidden(x), kernel)
        return y + bias.astype(x.dtype)


class SwiGlu(nnx.Module):
    """LLaMA's gated feed-forward: ``down(silu(gate x) * up x)``, no biases."""

    def __init__(
        self, width: int, hidden: int, *, rngs: nnx.Rngs, init: Initializer, out_init: Initializer
    ):
        self.gate = param(rngs, (width, hidden), ("embed", "mlp"), init)
        self.up = param(rngs, (width, hidden), ("embed", "mlp"), init)
        self.down = param(rngs, (hidden, width), ("mlp", "embed"), out_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(dense(x, self.gate[...]), "gate")
        up = checkpoint_name(dense(x, self.up[...]), "up")
        h = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return dense(h, self.down[...])
