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

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = ("replica", "fsdp")
AT_REST: dict[str, str] = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
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
