"""Mesh sizes: -1 takes what is left, everything else must fit."""

from __future__ import annotations

import pytest

from internvl_jax.sharding.mesh import MeshConfig, make_mesh, one_device
from internvl_jax.sharding.rules import batch_shards, head_shards


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 8, (1, 8, 1)),
        (MeshConfig(2, -1, 2), 8, (2, 2, 2)),
        (MeshConfig(-1, 4, 1), 8, (2, 4, 1)),
        (MeshConfig(1, 1, -1), 8, (1, 1, 8)),
        (MeshConfig(4, 128, 1), 512, (4, 128, 1)),
    ],
)
def test_sizes(config, devices, sizes):
    assert config.sizes(devices) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, -1, 1), "8 devices do not divide by 3"),
        (MeshConfig(2, 2, 1), "2x2x1 needs 4 devices, there are 8: change the mesh"),
        (MeshConfig(-1, -1, 1), "with at most one -1"),
        (MeshConfig(0, 8, 1), "must be positive"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        config.sizes(8)


def test_the_mesh_of_a_config():
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "tensor": 2}
    assert batch_shards(mesh) == 4 and head_shards(mesh) == 2
    assert dict(one_device().shape) == {"replica": 1, "fsdp": 1, "tensor": 1}
