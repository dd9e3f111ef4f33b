"""Feed-forward blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.nn.lora import LoraConfig, adapted, adapter
from internvl_jax.nn.param import Initializer, kernel_init, param, zeros
from internvl_jax.nn.regularize import Randomness
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
        lora: LoraConfig | None = None,
    ):
        out = width if out is None else out
        init = init or kernel_init(width)
        self.fc1 = param(rngs, (width, hidden), ("embed", "mlp"), init)
        self.fc1_bias = param(rngs, (hidden,), ("mlp",), zeros)
        self.fc2 = param(rngs, (hidden, out), ("mlp", "embed"), out_init or init)
        self.fc2_bias = param(rngs, (out,), ("embed",), zeros)
        self.fc1_lora = adapter(lora, "mlp/fc1", self.fc1, rngs=rngs)
        self.fc2_lora = adapter(lora, "mlp/fc2", self.fc2, rngs=rngs)

    def hidden(self, x: jax.Array, random: Randomness | None = None) -> jax.Array:
        """[B, P, D] -> [B, P, F] after the activation."""
        h = adapted(x, self.fc1[...], self.fc1_lora, random)
        h = checkpoint_name(h + self.fc1_bias[...].astype(x.dtype), "fc1")
        return jax.nn.gelu(h, approximate=False)

    def __call__(
        self,
        x: jax.Array,
        gain: jax.Array | None = None,
        random: Randomness | None = None,
    ) -> jax.Array:
        """Applies the block.

        Args:
            x: [..., D].
            gain: per-channel LayerScale [D], folded into the second matrix: the same function,
                but its gradient does not need the block's output to be kept or recomputed.
            random: the layer's, for the adapters' dropout.
        """
        kernel, bias = self.fc2[...], self.fc2_bias[...]
        if gain is not None:
            kernel, bias = kernel.astype(jnp.float32) * gain, bias * gain
        y = adapted(self.hidden(x, random), kernel, self.fc2_lora, random, gain=gain)
        return y + bias.astype(x.dtype)


class SwiGlu(nnx.Module):
    """LLaMA's gated feed-forward: ``down(silu(gate x) * up x)``, no biases."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        init: Initializer,
        out_init: Initializer,
        lora: LoraConfig | None = None,
    ):
        self.gate = param(rngs, (width, hidden), ("embed", "mlp"), init)
        self.up = param(rngs, (width, hidden), ("embed", "mlp"), init)
        self.down = param(rngs, (hidden, width), ("mlp", "embed"), out_init)
        self.gate_lora = adapter(lora, "mlp/gate", self.gate, rngs=rngs)
        self.up_lora = adapter(lora, "mlp/up", self.up, rngs=rngs)
        self.down_lora = adapter(lora, "mlp/down", self.down, rngs=rngs)

    def __call__(self, x: jax.Array, random: Randomness | None = None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `random` is the layer's, for the adapters' dropout."""
        gate = checkpoint_name(adapted(x, self.gate[...], self.gate_lora, random), "gate")
        up = checkpoint_name(adapted(x, self.up[...], self.up_lora, random), "up")
        h = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return adapted(h, self.down[...], self.down_lora, random)
