"""Layers stacked on a leading axis and scanned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.nn.param import axes_of
from internvl_jax.sharding.rules import gathered

REMAT_NAMES = ("qkv", "attn", "fc1", "gate", "up")


def remat_policy(spec: str) -> Callable | None:
    """A rematerialisation policy by name.

    Args:
        spec: ``none`` keeps every activation, ``full`` only the layers' inputs, a comma-separated
            list of `REMAT_NAMES` keeps those as well.
    """
    if spec == "none":
        return jax.checkpoint_policies.everything_saveable
    names = [] if spec == "full" else spec.split(",")
    for name in names:
        if name not in REMAT_NAMES:
            raise ValueError(
                f"Unknown activation {name!r} in remat={spec!r}: use none, full or {REMAT_NAMES}."
            )
    return jax.checkpoint_policies.save_only_these_names(*names)


class Stack(nnx.Module):
    """`depth` equal layers whose parameters carry a leading layer axis; the call is one scan."""

    def __init__(self, make_layer: Callable[..., nnx.Module], depth: int, *, rngs: nnx.Rngs):
        self.depth = depth
        self.layers = nnx.vmap(lambda r: make_layer(rngs=r), in_axes=0, out_axes=0)(
            rngs.split(depth)
        )

    def layer(self, index: int) -> Any:
        """One layer as a module of its own (a view for inspection and parity taps)."""
        graphdef, state = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))

    def __call__(
        self,
        call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
        x: jax.Array,
        per_layer: Any = None,
        *,
        remat: str = "none",
        dtype: Any = None,
        head_multiple: int = 1,
        unroll: int = 1,
        taps: Sequence[int] = (),
    ) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        """Runs the layers in order.

        Args:
            call: ``call(layer, x, inputs) -> (x, outputs)``.
            x: the carried activation.
            per_layer: pytree of arrays with leading axis `depth` (drop-path rates, keys, caches).
            remat: see `remat_policy`.
            dtype: matrices are cast to it before they are gathered from their shards.
            head_multiple: ViT heads are zero-padded to a multiple of it (tensor parallelism); the
                parameters at rest, and so every checkpoint, keep the true number.
            unroll: layers per iteration of the scan.
            taps: layers whose output is wanted as well (negative counts from the end).

        Returns:
            The last x, the stacked per-layer outputs, and the tapped outputs.
        """
        graphdef, state = nnx.split(self.layers)
        taps = tuple(t % self.depth for t in taps)

        def body(carry, inputs):
            x, tapped = carry
            index, layer_state, extra = inputs
            layer_state = _prepare(layer_state, dtype, head_multiple)
            x, out = call(nnx.merge(graphdef, layer_state), x, extra)
            tapped = tuple(
                jnp.where(index == t, x, old) for t, old in zip(taps, tapped, strict=True)
            )
            return (x, tapped), out

        if remat != "none":
            body = jax.checkpoint(body, policy=remat_policy(remat), prevent_cse=False)
        tapped = tuple(jnp.zeros_like(x) for _ in taps)
        inputs = (jnp.arange(self.depth), state, per_layer)
        (x, tapped), outs = jax.lax.scan(body, (x, tapped), inputs, unroll=min(unroll, self.depth))
        return x, outs, tapped


def _prepare(state: Any, dtype: Any, head_multiple: int) -> Any:
    """One layer's parameters as the computation wants them: heads padded, cast, then gathered."""

    def prepare(variable: nnx.Variable) -> nnx.Variable:
        value, axes = variable.get_value(), axes_of(variable)
        if head_multiple > 1 and "vit_heads" in axes:
            at = axes.index("vit_heads")
            widths = [(0, 0)] * value.ndim
            widths[at] = (0, -value.shape[at] % head_multiple)
            value = jnp.pad(value, widths)
        if dtype is not None and value.ndim > 1 and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(dtype)
        return variable.replace(gathered(value, axes, padded=head_multiple > 1))

    return jax.tree.map(prepare, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
