"""Norms, feed-forward blocks, rotary positions and named parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.nn.mlp import Mlp, SwiGlu
from internvl_jax.nn.norm import LayerNorm, RMSNorm, make_norm
from internvl_jax.nn.param import axes_of, normal, param, zeros
from internvl_jax.nn.rope import apply_rope, rope_tables


def test_rms_norm(drawn):
    norm = drawn(lambda rngs: RMSNorm(6, eps=1e-3, rngs=rngs))
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-6)


def test_norm_over_padded_heads_divides_by_the_true_width():
    norm = RMSNorm((5, 4), eps=1e-6, axes=("vit_heads", "head_dim"), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5, 4)), jnp.float32)
    expected = norm(x)
    norm.scale = nnx.Param(jnp.pad(norm.scale[...], ((0, 3), (0, 0))))
    padded = norm(jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0))))
    np.testing.assert_allclose(padded[:, :, :5], expected, rtol=1e-6)
    assert not np.any(padded[:, :, 5:])


def test_layer_norm(drawn):
    norm = drawn(lambda rngs: LayerNorm(6, eps=1e-3, rngs=rngs))
    x = np.random.default_rng(2).normal(size=(2, 6)).astype(np.float32)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    expected = y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_reduce_in_float32(kind):
    norm = make_norm(kind, 512, eps=1e-6, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 512)) * 300, jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    exact = norm(x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-7, atol=1e-2)


def test_an_unknown_norm_is_named():
    with pytest.raises(ValueError, match="'batch': use 'rms' or 'layer'"):
        make_norm("batch", 4, eps=1e-6, rngs=nnx.Rngs(0))


def test_mlp_is_exact_gelu_and_folds_layer_scale(drawn):
    mlp = drawn(lambda rngs: Mlp(4, 8, rngs=rngs))
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    w1, b1, w2, b2 = (np.asarray(p[...]) for p in (mlp.fc1, mlp.fc1_bias, mlp.fc2, mlp.fc2_bias))
    h = x @ w1 + b1
    h = h * 0.5 * (1 + np.asarray(jax.scipy.special.erf(h / np.sqrt(2))))
    np.testing.assert_allclose(mlp(jnp.asarray(x)), h @ w2 + b2, atol=1e-5)
    gain = jnp.asarray(rng.normal(size=4), jnp.float32)
    np.testing.assert_allclose(mlp(jnp.asarray(x), gain=gain), (h @ w2 + b2) * gain, atol=1e-5)


def test_swiglu(drawn):
    mlp = drawn(lambda rngs: SwiGlu(4, 8, rngs=rngs, init=normal(1), out_init=normal(1)))
    x = np.random.default_rng(5).normal(size=(2, 3, 4)).astype(np.float32)
    gate, up, down = (np.asarray(p[...]) for p in (mlp.gate, mlp.up, mlp.down))
    g = x @ gate
    expected = (g / (1 + np.exp(-g)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, atol=1e-5)


def test_rope_turns_half_split_pairs():
    positions = jnp.asarray([[0, 1, 7]])
    x = np.random.default_rng(6).normal(size=(1, 3, 2, 8)).astype(np.float32)
    y = np.asarray(apply_rope(jnp.asarray(x), rope_tables(positions, 8, 10000.0)))
    for t, position in enumerate([0, 1, 7]):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            turned = (x[0, t, :, i] + 1j * x[0, t, :, i + 4]) * np.exp(1j * angle)
            np.testing.assert_allclose(y[0, t, :, i], turned.real, atol=1e-5)
            np.testing.assert_allclose(y[0, t, :, i + 4], turned.imag, atol=1e-5)


def test_rope_takes_fractions():
    whole = rope_tables(jnp.asarray([[1, 2]]), 4, 10000.0)
    parts = rope_tables(jnp.asarray([[1.0, 1.5, 2.0]]), 4, 10000.0)
    np.testing.assert_allclose(parts[0][:, ::2], whole[0], atol=1e-7)
    assert not np.allclose(parts[0][:, 1], whole[0][:, 0])


def test_parameters_name_their_axes():
    leaf = param(nnx.Rngs(0), (2, 3), ("embed", None), zeros)
    assert axes_of(leaf) == ("embed", None)
    stacked = leaf.replace(jnp.zeros((4, 2, 3)))
    assert axes_of(stacked) == (None, "embed", None)
    with pytest.raises(ValueError, match="needs 2 axis names"):
        param(nnx.Rngs(0), (2, 3), ("embed",), zeros)
