"""Where parameters live, and the sentences for those that cannot."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from internvl_jax.models import presets
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.models.llama import Llama
from internvl_jax.sharding.mesh import MeshConfig, make_mesh
from internvl_jax.sharding.rules import (
    batch_sharding,
    constrain,
    gathered,
    parameter_sharding,
    per_shard,
    replicated,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 2, 4))


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "heads", "head_dim"), (8, 4, 5), ("fsdp", "tensor", None)),
        ((None, "mlp", "embed"), (3, 8, 8), (None, "tensor", "fsdp")),
        (("embed", None, "vit_heads", "head_dim"), (8, 3, 5, 4), ("fsdp", None, None, None)),
        (("vocab", "embed"), (7, 8), (None, "fsdp")),
        (("embed", "contrastive"), (8, 3), ("fsdp", None)),
        ((), (), ()),
    ],
)
def test_the_table(mesh, axes, shape, spec):
    assert parameter_sharding("a/b", shape, axes, mesh).spec == PartitionSpec(*spec)


def test_a_size_that_does_not_divide_is_named_before_anything_compiles(mesh):
    with pytest.raises(ValueError) as error:
        parameter_sharding("llm/layers/attn/k", (8, 2, 4), ("embed", "kv_heads", "head_dim"), mesh)
    assert str(error.value) == (
        "llm/layers/attn/k: its axis 'kv_heads' of size 2 does not divide over mesh axis 'tensor' "
        "of size 4: choose a mesh.tensor that divides 2."
    )


def test_two_axes_on_one_mesh_axis_are_refused(mesh):
    with pytest.raises(ValueError, match=r"a/b: two of its axes .* map to the same mesh axis"):
        parameter_sharding("a/b", (8, 8), ("heads", "mlp"), mesh)


@pytest.mark.parametrize("fsdp", [256, 512])
def test_a_width_of_3200_stops_at_128_shards(fsdp):
    """3,200 = 128 x 25: beyond that a run replicates (replica x 128)."""
    wide = jax.sharding.AbstractMesh((1, fsdp, 1), ("replica", "fsdp", "tensor"))
    build = lambda rngs: InternViT(presets.internvit_6b_224(), Compute(), rngs=rngs)
    definition = Definition.of(build, lambda path: True)
    with pytest.raises(ValueError, match="axis 'embed' of size 3200 does not divide"):
        definition.abstract(wide, "float32")


def test_grouped_heads_bound_the_tensor_axis():
    cfg = dataclasses.replace(presets.vicuna_7b(), kv_heads=4)
    definition = Definition.of(lambda rngs: Llama(cfg, Compute(), rngs=rngs), lambda path: True)
    with pytest.raises(ValueError, match=r"'kv_heads' of size 4 .* choose a mesh.tensor"):
        definition.abstract(
            jax.sharding.AbstractMesh((1, 1, 8), ("replica", "fsdp", "tensor")), "float32"
        )


def test_a_batch_is_split_over_all_devices_but_those_of_one_layer(mesh):
    x = jax.device_put(np.zeros((4, 3)), batch_sharding(mesh))
    assert {s.data.shape for s in x.addressable_shards} == {(2, 3)}
    assert replicated(mesh).is_fully_replicated


def test_constraints_do_nothing_without_a_mesh(mesh):
    x = jnp.ones((4, 6, 4))
    assert constrain(x, "batch", None, "heads") is x
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: constrain(x, "batch", None, "heads"))(x)
        whole = jax.jit(lambda x: gathered(x, ("vit_heads", None, None), padded=False))(x)
        padded = jax.jit(lambda x: gathered(x, ("vit_heads", None, None), padded=True))(x)
    assert {s.data.shape for s in split.addressable_shards} == {(2, 6, 1)}
    assert whole.sharding.is_fully_replicated
    assert {s.data.shape for s in padded.addressable_shards} == {(1, 6, 4)}


def test_per_shard_hands_each_device_its_own_rows(mesh):
    batch = {"x": jnp.arange(8.0)}
    seen = []

    def total(batch, factor, axes):
        seen.append((batch["x"].shape, axes))
        s = jnp.sum(batch["x"]) * factor
        return jax.lax.psum(s, axes) if axes else s

    alone = per_shard(total, batch, jnp.float32(2))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda b: per_shard(total, b, jnp.float32(2)))(batch)
    assert float(alone) == float(split) == 56
    assert seen == [((8,), ()), ((4,), ("replica", "fsdp"))]
