"""The device mesh: replica x fsdp x tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
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
    """Builds the mesh in the order in which neighbours communicate most on the last axes.

    Of several slices, each holds whole replicas: only gradients cross the data-centre network.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    replica, fsdp, tensor = config.sizes(len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if replica % slices:
        raise ValueError(
            f"mesh.replica={replica} does not split over {slices} slices: make it a multiple."
        )
    shape = (replica // slices, fsdp, tensor)
    # An axis of the mesh may be part of an axis of the torus: 4 x 128 on 8 x 8 x 8 chips.
    if slices > 1:
        array = mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def one_device() -> Mesh:
    """The mesh of the first device alone."""
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def platform() -> str:
    """What the computation is for: ``cpu``, ``gpu`` or ``tpu``.

    That is the mesh's devices, which need not be here (a plan compiles for absent ones).
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
