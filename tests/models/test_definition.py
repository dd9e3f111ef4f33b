"""The pure boundary: paths that do not change, trees that must match, nothing allocated early."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.llama import Llama, LlamaConfig
from internvl_jax.sharding.mesh import one_device
from internvl_jax.tree import flatten, unflatten

CFG = InternVLConfig(
    vision=VitConfig(image_size=16, patch_size=8, width=12, depth=2, heads=3, mlp_dim=16),
    qllama=LlamaConfig(
        vocab_size=20,
        width=16,
        depth=5,
        heads=4,
        mlp_dim=24,
        cross_frequency=3,
        vision_width=12,
    ),
    queries=3,
    embed_dim=6,
    pool_heads=2,
)


@pytest.fixture(scope="module")
def definition():
    compute = Compute(dtype="float32", remat="none")
    build = lambda rngs: InternVL(CFG, compute, rngs=rngs)
    return Definition.of(build, lambda path: "/cross/" in path)


def test_paths_are_readable(definition):
    paths = set(definition.variables)
    assert {
        "vision/blocks/layers/attn/qkv",
        "vision/pos",
        "qllama/periods/layers/first/cross/norm2/scale",
        "qllama/periods/layers/rest/1/mlp/down",
        "qllama/tail/rest/0/attn/q",
        "qllama/tail/first/cross/q",
        "clip_projector2/k_bias",
        "logit_scale",
    } <= paths
    assert not any("value" in p or "raw" in p for p in paths)


def test_axes_name_what_an_axis_is(definition):
    assert definition.axes("vision/blocks/layers/attn/qkv") == (
        None,
        "embed",
        None,
        "vit_heads",
        "head_dim",
    )
    assert definition.axes("qllama/tail/first/attn/q") == ("embed", "heads", "head_dim")
    assert definition.axes("logit_scale") == ()
    assert definition.stacked("vision/blocks/layers/ls1")
    assert not definition.stacked("qllama/tail/first/attn/q")


def test_trained_and_frozen_share_nothing(definition):
    trained, frozen = (flatten(t) for t in definition.abstract(one_device(), "bfloat16"))
    assert trained.keys() | frozen.keys() == definition.variables.keys()
    assert not trained.keys() & frozen.keys()
    assert all("/cross/" in p for p in trained)
    assert {x.dtype for x in trained.values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in frozen.values()} == {jnp.dtype("bfloat16")}


def test_fresh_makes_every_leaf_from_its_seed():
    cfg = dataclasses.replace(CFG.qllama, depth=1, cross_frequency=0, vision_width=0)
    compute = Compute(dtype="float32", remat="none")
    small = Definition.of(lambda rngs: Llama(cfg, compute, rngs=rngs), lambda path: True)
    flat, again, other = (flatten(small.fresh(seed)) for seed in (0, 0, 1))
    assert {p: x.shape for p, x in flat.items()} == {
        p: v.get_value().shape for p, v in small.variables.items()
    }
    np.testing.assert_array_equal(again["embedding"], flat["embedding"])
    assert not np.array_equal(other["embedding"], flat["embedding"])


def test_merge_puts_every_leaf_in_its_place(definition):
    rng = np.random.default_rng(0)
    flat = {
        path: jnp.asarray(rng.normal(size=v.get_value().shape), jnp.float32)
        for path, v in definition.variables.items()
    }
    model = definition.merge(unflatten(flat))
    np.testing.assert_array_equal(model.vision.pos[...], flat["vision/pos"])
    kernel = model.qllama.periods.layers.rest[1].mlp.down[...]
    np.testing.assert_array_equal(kernel, flat["qllama/periods/layers/rest/1/mlp/down"])


def test_a_tree_of_another_model_is_refused(definition):
    shapes = {p: v.get_value() for p, v in definition.variables.items()}
    missing = {p: x for p, x in shapes.items() if p != "logit_scale"}
    with pytest.raises(ValueError, match="first difference: logit_scale"):
        definition.merge(unflatten(missing))
    with pytest.raises(ValueError, match="first difference: another"):
        definition.merge(unflatten({**shapes, "another": shapes["logit_scale"]}))


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
