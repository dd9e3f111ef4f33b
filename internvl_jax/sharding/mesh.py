"""The device mesh: replica x fsdp x tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes what is left.

    Attributes:
        replica: copies of the parameters (slices, data-centre network).
        fsdp: parameters, gradients and optimizer state are split over it.
        tensor: heads and MLP columns are split over it.
    """

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Resolves -1 for a number of devices. Raises ValueError where the product cannot fit."""
        sizes = [self.replica, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"mesh {sizes} must be positive, with at most one -1.")
        known = math.prod(s for s in sizes if s != -1)
        if -1 in sizes:
            if devices % known:
                raise ValueError(
                    f"{devices} devices do not divide by {known}, the product of the set mesh axes."
                )
            sizes[sizes.index(-1)] = devices // known
        elif known != devices:
            raise ValueError(
                f"mesh replica x fsdp x tensor = {'x'.join(map(str, sizes))} needs {known} "
                f"devices, there are {devices}: change the mesh or set one axis to -1."
            )
        return sizes[0], sizes[1], sizes[2]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh in the order in which neighbours communicate most on the last axes."""
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def one_device() -> Mesh:
    """The mesh of the first device alone."""
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
