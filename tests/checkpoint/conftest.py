"""A small state of every kind of leaf, spread over eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh_of(rows: int, columns: int) -> Mesh:
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: rows * columns]
    return jax.make_mesh((rows, columns), ("r", "c"), axis_types=auto, devices=devices)


def state_on(mesh: Mesh, seed: int) -> dict:
    """Nested dict: f32, bf16, int, bool, scalar and empty leaves, sharded in different ways."""
    rng = np.random.default_rng(seed)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "params": {
            "blocks": {"kernel": put(rng.normal(size=(3, 8, 16)).astype("f4"), None, "r", "c")},
            "head": put(rng.normal(size=(16, 8)).astype(jnp.bfloat16), "c"),
            "scale": put(np.float32(rng.normal())),
        },
        "opt": {"count": put(np.int32(seed)), "seen": put(rng.random(8) > 0.5, "r")},
        "nothing": put(np.zeros((0, 4), np.float32)),
    }


def shapes(tree, mesh: Mesh | None = None):
    """Abstract version of a tree: on its own mesh, or on another one with the same axes."""

    def describe(x):
        on = x.sharding if mesh is None else NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)

    return jax.tree.map(describe, tree)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(name="mesh_of")
def _mesh_of():
    return mesh_of


@pytest.fixture(name="state_on")
def _state_on():
    return state_on


@pytest.fixture(name="shapes")
def _shapes():
    return shapes


@pytest.fixture(name="assert_same")
def _assert_same():
    return assert_same


@pytest.fixture
def mesh():
    return mesh_of(2, 4)
