"""From logical axes to the mesh: the one table that says where everything lives.

A model names what an axis *is* (``embed``, ``heads``, ``mlp`` ...). This table says which mesh axis
holds it at rest and during the computation:

=============  ===============  =======================================================
logical axis   at rest          in the computation
=============  ===============  =======================================================
batch          -                split over replica and fsdp
embed          fsdp             gathered: whole on every device while a layer runs
heads, mlp     tensor           tensor: each device computes its heads and its columns
kv_heads       tensor           tensor
vit_heads      whole            tensor, after zero-padding (25 heads divide by nothing)
vocab          whole            whole (49,954 = 2 x 24,977 hardly divides)
=============  ===============  =======================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

BATCH = ("replica", "fsdp")
AT_REST: dict[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
COMPUTE: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def _spec(axes: tuple[str | None, ...], rules: dict[str, Any]) -> PartitionSpec:
    return PartitionSpec(*(rules.get(a) if a is not None else None for a in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh in the computation; does nothing without a mesh.

    Args:
        x: any array.
        axes: one logical name or None per axis of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, COMPUTE))


def gathered(x: jax.Array, axes: tuple[str | None, ...], *, padded: bool) -> jax.Array:
    """A parameter as a layer uses it: gathered over fsdp, split over tensor.

    Its gradient goes the other way: it is summed into the shards, never whole on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return _gathered(tuple("heads" if a == "vit_heads" and padded else a for a in axes), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(axes: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    return constrain(x, *axes)


def _gathered_forward(axes: tuple[str | None, ...], x: jax.Array) -> tuple[jax.Array, None]:
    return constrain(x, *axes), None


def _gathered_backward(axes: tuple[str | None, ...], _: None, dx: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(dx, _spec(axes, AT_REST)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def parameter_sharding(
    path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """Where a parameter lives at rest.

    Args:
        path: its name, for the message.
        shape: full shape, stacked layer axis included.
        axes: one logical name or None per axis of the shape.
        mesh: the device mesh, or only its shape.

    Raises:
        ValueError: where two axes of one parameter claim the same mesh axis, or a size does not
            divide, before anything is compiled.
    """
    spec = _spec(axes, AT_REST)
    used = [name for name in spec if name is not None]
    if len(set(used)) < len(used):
        raise ValueError(
            f"{path}: two of its axes {axes} map to the same mesh axis; change sharding.rules."
        )
    for size, logical, name in zip(shape, axes, spec, strict=True):
        if name is not None and size % mesh.shape[name]:
            raise ValueError(
                f"{path}: its axis {logical!r} of size {size} does not divide over mesh axis "
                f"{name!r} of size {mesh.shape[name]}: choose a mesh.{name} that divides {size}."
            )
    return NamedSharding(mesh, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over every device that computes different examples."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def head_shards(mesh: Mesh) -> int:
    """Over how many devices the attention heads of a layer are split."""
    return mesh.shape["tensor"]


def per_shard(fn: Callable[..., Any], batch: Mapping[str, jax.Array], *whole: Any) -> Any:
    """Runs a loss on each device's own rows; what it returns must be the same on all of them.

    Args:
        fn: ``fn(batch, *whole, axes=names)``; `names` are the mesh axes to gather and sum over,
            empty without a mesh.
        batch: arrays with the batch on axis 0, handed over in shards.
        whole: pytrees handed over whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(batch, *whole, axes=())
    in_specs = (PartitionSpec(BATCH), *(PartitionSpec() for _ in whole))
    mapped = jax.shard_map(
        functools.partial(fn, axes=BATCH), in_specs=in_specs, out_specs=PartitionSpec()
    )
    return mapped(dict(batch), *whole)


def map_shards(
    fn: Callable[..., Any],
    *arrays: tuple[jax.Array, tuple[str | None, ...]],
    out: tuple[str | None, ...] | list[Any],
) -> Any:
    """Runs a function on each device's own part: for kernels that the partitioner cannot split.

    A logical axis some size of which does not divide over its mesh axes stays whole: every device
    then computes all of it.

    Args:
        fn: takes the parts of the arrays, gives its part of the result.
        arrays: each with one logical name or None per axis.
        out: the same for the result, or a list of them for a tuple of results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    values = [x for x, _ in arrays]
    if mesh.empty:
        return fn(*values)

    def shards(name: str) -> int:
        names = COMPUTE[name]
        return math.prod(mesh.shape[a] for a in ((names,) if isinstance(names, str) else names))

    whole = {
        a for x, axes in arrays for n, a in zip(x.shape, axes, strict=True) if a and n % shards(a)
    }
    rules = {name: where for name, where in COMPUTE.items() if name not in whole}
    return jax.shard_map(
        fn,
        in_specs=tuple(_spec(axes, rules) for _, axes in arrays),
        out_specs=tuple(_spec(o, rules) for o in out)
        if isinstance(out, list)
        else _spec(out, rules),
        check_vma=False,  # a kernel's outputs do not say over which axes they vary
    )(*values)
