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
    """A parameter as a layer uses it: gathered over fsdp, split over tensor."""
    names = tuple("heads" if a == "vit_heads" and padded else a for a in axes)
    return constrain(x, *names)


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
