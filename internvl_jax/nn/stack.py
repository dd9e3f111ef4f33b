"""Layers stacked on a leading axis and scanned."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.nn.param import axes_of
from internvl_jax.sharding.rules import gathered

REMAT_NAMES = ("weights", "layer", "qkv", "attn", "mid", "fc1", "gate", "up")


class Kept(NamedTuple):
    """Activations that the backward pass finds again: a name, where they rest, in which layers."""

    name: str
    host: bool
    layers: int | None


def parse_remat(spec: str) -> tuple[Kept, ...] | None:
    """What the backward pass may keep, beside the layers' inputs; None for everything.

    Args:
        spec: ``none`` rematerialises nothing, ``full`` everything; else a comma-separated list of
            what is kept: ``NAME[@host][:LAYERS]``, NAME one of `REMAT_NAMES`, ``@host`` to rest in
            the host's memory (``layer@host``: the layers' inputs themselves), LAYERS how many
            iterations of the scan, the first ones, keep it. ``fc1:24,qkv:8`` fills what memory
            there is; ``weights`` are the gathered ones, which are then not gathered twice.

    Raises:
        ValueError: an unknown name, or a count that is none.
    """
    if spec == "none":
        return None
    kept = []
    for entry in [] if spec == "full" else spec.split(","):
        name, _, layers = entry.strip().partition(":")
        name, _, place = name.partition("@")
        if name not in REMAT_NAMES or place not in ("", "host"):
            raise ValueError(
                f"Unknown activation {entry!r} in remat={spec!r}: use none, full or a list of "
                f"{', '.join(REMAT_NAMES)}, each as NAME[@host][:LAYERS]."
            )
        if layers and not layers.isdigit():
            raise ValueError(f"{entry!r} in remat={spec!r} does not count layers: use {name}:8.")
        kept.append(Kept(name, place == "host", int(layers) if layers else None))
    return tuple(kept)


def _segments(spec: str, depth: int) -> list[tuple[int, int, Callable | None]]:
    """(first layer, last layer + 1, rematerialisation policy or None for none at all)."""
    kept = parse_remat(spec)
    if kept is None:
        return [(0, depth, None)]
    ends = sorted({depth, *(min(k.layers, depth) for k in kept if k.layers is not None)} - {0})
    segments, start = [], 0
    for end in ends:
        here = [k for k in kept if k.layers is None or k.layers >= end]
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[k.name for k in here if not k.host],
            names_which_can_be_offloaded=[k.name for k in here if k.host],
            offload_src="device",
            offload_dst="pinned_host",
        )
        segments.append((start, end, policy))
        start = end
    return segments


@dataclasses.dataclass(frozen=True)
class Run:
    """Runs one layer: its parameters prepared, its activations rematerialised.

    Attributes:
        policy: which activations the backward pass may keep; None keeps all.
        dtype: matrices are cast to it before they are gathered from their shards.
        head_multiple: ViT heads are zero-padded to a multiple of it.
    """

    policy: Callable | None = None
    dtype: Any = None
    head_multiple: int = 1

    def __call__(self, layer: Any, call: Callable[[Any, jax.Array], Any], x: jax.Array) -> Any:
        """``call(layer, x)``; what else it needs comes with its closure."""
        graphdef, state = nnx.split(layer)

        def prepared(state: Any, x: jax.Array) -> Any:
            # Gathered in here: the backward pass gathers again instead of keeping whole layers.
            state = _prepare(state, self.dtype, self.head_multiple)
            return call(nnx.merge(graphdef, state), checkpoint_name(x, "layer"))

        if self.policy is not None:
            # In a scan nothing could be eliminated; the barrier would only copy what is kept.
            prepared = jax.checkpoint(prepared, policy=self.policy, prevent_cse=False)
        return prepared(state, x)


Call = Callable[[Any, jax.Array, Any, Run], tuple[jax.Array, Any]]
Scanned = tuple[jax.Array, Any, tuple[jax.Array, ...]]


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

    def __call__(self, call: Call, x: jax.Array, per_layer: Any = None, **options: Any) -> Scanned:
        """Runs the layers in order: see `scan_layers`."""
        return scan_layers(self.layers, self.depth, call, x, per_layer, **options)


def scan_layers(
    layers: nnx.Module,
    depth: int,
    call: Call,
    x: jax.Array,
    per_layer: Any = None,
    *,
    remat: str = "none",
    dtype: Any = None,
    head_multiple: int = 1,
    unroll: int = 1,
    taps: Sequence[int] = (),
) -> Scanned:
    """Runs equal layers in order.

    Args:
        layers: a module whose parameters carry a leading axis of size `depth`.
        call: ``call(layer, x, inputs, run) -> (x, outputs)``; it calls the layer, or each of the
            layers that one of the scan's iterations holds, through `run`: see `Run`.
        x: the carried activation.
        per_layer: pytree of arrays with leading axis `depth` (drop-path rates, keys, caches).
        remat: see `parse_remat`.
        dtype: matrices are cast to it before they are gathered from their shards.
        head_multiple: ViT heads are zero-padded to a multiple of it (tensor parallelism); the
            parameters at rest, and so every checkpoint, keep the true number.
        unroll: layers per iteration of the scan.
        taps: layers whose output is wanted as well (negative counts from the end).

    Returns:
        The last x, the stacked per-layer outputs, and the tapped outputs.
    """
    graphdef, state = nnx.split(layers)
    taps = tuple(t % depth for t in taps)

    def body(policy, carry, inputs):
        x, tapped = carry
        index, layer_state, extra = inputs
        run = Run(policy, dtype, head_multiple)
        x, out = call(nnx.merge(graphdef, layer_state), x, extra, run)
        tapped = tuple(jnp.where(index == t, x, old) for t, old in zip(taps, tapped, strict=True))
        return (x, tapped), out

    tapped = tuple(jnp.zeros_like(x) for _ in taps)
    inputs = (jnp.arange(depth), state, per_layer)
    outs = []
    for start, stop, policy in _segments(remat, depth):
        part = inputs
        if stop - start < depth:
            part = jax.tree.map(operator.itemgetter(slice(start, stop)), inputs)
        step, count = functools.partial(body, policy), min(unroll, stop - start)
        (x, tapped), out = jax.lax.scan(step, (x, tapped), part, unroll=count)
        outs.append(out)
    joined = outs[0] if len(outs) == 1 else jax.tree.map(lambda *o: jnp.concatenate(o), *outs)
    return x, joined, tapped


def interleave(stacked: Sequence[nnx.Module], single: Sequence[nnx.Module] = ()) -> nnx.Module:
    """Layers of one kind as one stacked module.

    Args:
        stacked: modules with a leading axis each; their layers take turns.
        single: further layers, after those.
    """
    graphdef = nnx.graphdef(single[0] if single else stacked[0])
    states = [nnx.state(m) for m in stacked]
    parts = []
    if states:
        join = lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:])
        parts.append(states[0] if len(states) == 1 else jax.tree.map(join, *states))
    parts += [jax.tree.map(lambda leaf: leaf[None], nnx.state(m)) for m in single]
    whole = parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    return nnx.merge(graphdef, whole)


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
        value = gathered(value, axes, padded=head_multiple > 1)
        return variable.replace(checkpoint_name(value, "weights"))

    return jax.tree.map(prepare, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
