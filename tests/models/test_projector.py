"""Projectors, attention pooling, and pixel unshuffle against stored arrays of the official code.

`pixel_shuffle.npz`: x_i as the model feeds it [n, rows, columns, c], v1_i and v2_i what came out.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models.attention_pool import AttentionPool, pool_param_count
from internvl_jax.models.projector import Mlp1, Mlp2xGelu, pixel_unshuffle, projector_param_count

STORED = np.load(Path(__file__).with_name("pixel_shuffle.npz"))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("case", "factor"), [(0, 2), (1, 2), (2, 4)])
def test_pixel_unshuffle_equals_the_official_code(case, factor, version):
    x, expected = STORED[f"x_{case}"], STORED[f"{version}_{case}"]
    n, rows, columns, c = x.shape
    y = pixel_unshuffle(jnp.asarray(x.reshape(n, rows * columns, c)), factor, version)
    np.testing.assert_array_equal(y, expected.reshape(n, -1, c * factor**2))


def test_the_versions_differ_by_a_transposition():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 36, 2)), jnp.float32)
    v1, v2 = (pixel_unshuffle(x, 2, v).reshape(1, 3, 3, 8) for v in ("v1", "v2"))
    np.testing.assert_array_equal(v1, v2.swapaxes(1, 2))


def test_tokens_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="12 patch tokens are not a square grid"):
        pixel_unshuffle(jnp.zeros((1, 12, 2)))
    with pytest.raises(ValueError, match=r"9 patch tokens .* 2x2 squares tile"):
        pixel_unshuffle(jnp.zeros((1, 9, 2)))
    with pytest.raises(ValueError, match="'v3': use 'v1' or 'v2'"):
        pixel_unshuffle(jnp.zeros((1, 4, 2)), 2, "v3")


def test_mlp1_normalises_each_square(drawn):
    model = drawn(lambda rngs: Mlp1(3, 5, rngs=rngs))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 3)), jnp.float32)
    folded = np.asarray(pixel_unshuffle(x))
    mean, var = folded.mean(-1, keepdims=True), folded.var(-1, keepdims=True)
    normed = (folded - mean) / np.sqrt(var + 1e-5)
    normed = normed * np.asarray(model.norm.scale[...]) + np.asarray(model.norm.bias[...])
    np.testing.assert_allclose(model(x), model.mlp(jnp.asarray(normed)), atol=1e-5)
    assert model(x).shape == (2, 4, 5)


def test_mlp2x_gelu_keeps_tokens(drawn):
    model = drawn(lambda rngs: Mlp2xGelu(3, 5, rngs=rngs))
    assert model.fc1.shape == (3, 5) and model.fc2.shape == (5, 5)
    assert model(jnp.zeros((2, 16, 3))).shape == (2, 16, 5)


# Counted in the released projector files.
@pytest.mark.parametrize(
    ("llm", "vit", "both"), [(4096, 29_892_608, 63_455_232), (5120, 42_608_640, 89_804_800)]
)
def test_projector_sizes(llm, vit, both):
    assert projector_param_count("mlp2x_gelu", 3200, llm) == vit
    assert projector_param_count("two_mlp", 3200, llm, query_width=4096) == both
    with pytest.raises(ValueError, match="Unknown projector 'linear'"):
        projector_param_count("linear", 3200, llm)


def test_pool_sizes():
    assert pool_param_count(3200, 768) == 33_207_168
    assert pool_param_count(4096, 768) == 53_515_008


def layer_norm(x, norm):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def test_attention_pooling_by_hand(drawn):
    pool = drawn(lambda rngs: AttentionPool(6, 2, 4, rngs=rngs))
    x = np.random.default_rng(2).normal(size=(3, 5, 6)).astype(np.float32)
    get = lambda name: np.asarray(getattr(pool, name)[...])
    mean = x.mean(1, keepdims=True)  # the query: CLS included
    q = np.einsum("bpd,dnh->bpnh", layer_norm(mean, pool.norm_q), get("q")) + get("q_bias")
    k = np.einsum("bpd,dnh->bpnh", layer_norm(x, pool.norm_k), get("k")) + get("k_bias")
    v = np.einsum("bpd,dnh->bpnh", layer_norm(x, pool.norm_v), get("v")) + get("v_bias")
    scores = np.einsum("bqnh,bpnh->bnqp", q, k) / np.sqrt(3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bnqp,bpnh->bqnh", weights, v)
    expected = np.einsum("bqnh,nhe->be", y, get("out")) + get("out_bias")
    np.testing.assert_allclose(pool(jnp.asarray(x)), expected, atol=1e-4)


def test_key_biases_cancel_in_the_softmax(drawn):
    pool = drawn(lambda rngs: AttentionPool(6, 2, 4, rngs=rngs))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 6)), jnp.float32)
    before = pool(x)
    pool.k_bias[...] += 3.0
    pool.norm_k.bias[...] += 2.0
    np.testing.assert_allclose(pool(x), before, atol=1e-4)


def test_pooling_heads_must_divide_the_width(drawn):
    with pytest.raises(ValueError, match="width 6 does not split into 4 heads"):
        drawn(lambda rngs: AttentionPool(6, 4, 4, rngs=rngs))
