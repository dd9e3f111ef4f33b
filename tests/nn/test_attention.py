"""Attention against NumPy, and the options of the family against what they mean."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.nn.attend import attend
from internvl_jax.nn.attention import CrossAttention, DecoderAttention, VitAttention
from internvl_jax.nn.param import normal
from internvl_jax.nn.rope import rope_tables

INIT = dict(init=normal(0.02), out_init=normal(0.02))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One head at a time; q [B,T,N,H], k and v [B,S,K,H], mask [B,T,S]."""
    B, _, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            kv = n // (N // k.shape[2])
            scores = q[b, :, n] @ k[b, :, kv].T / np.sqrt(H)
            out[b, :, n] = softmax(np.where(mask[b], scores, -1e30)) @ v[b, :, kv]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_equals_numpy(kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 4, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, kv_heads, 6)).astype(np.float32)
    mask = rng.random((2, 5, 7)) < 0.6
    mask[..., 0] = True
    np.testing.assert_allclose(
        attend(*map(jnp.asarray, (q, k, v, mask))), by_hand(q, k, v, mask), atol=2e-6
    )


def test_a_row_that_sees_nothing_attends_uniformly():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32) for _ in range(3))
    mask = jnp.zeros((1, 3, 3), bool).at[0, 0].set(True)
    out = attend(q, k, v, mask)
    np.testing.assert_allclose(out[0, 1], v[0].mean(0), atol=1e-6)


def vit_attention(drawn, **options):
    defaults = dict(qkv_bias=False, qk_norm=True, eps=1e-6)
    make = functools.partial(VitAttention, 20, 5, **{**defaults, **options}, **INIT)
    return drawn(lambda rngs: make(rngs=rngs))


def test_qk_norm_runs_over_all_heads_together(drawn):
    attn = vit_attention(drawn)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 20)), jnp.float32)
    q, k, v = (np.asarray(t) for t in attn.project(x))

    def full_width(t: np.ndarray, scale: np.ndarray) -> np.ndarray:
        flat = t.reshape(2, 7, 20)
        return (flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)).reshape(t.shape) * scale

    q = full_width(q, np.asarray(attn.q_norm.scale[...]))
    k = full_width(k, np.asarray(attn.k_norm.scale[...]))
    expected = by_hand(q, k, v, np.ones((2, 7, 7), bool))
    np.testing.assert_allclose(attn.context(x), expected, atol=5e-6)


def test_qkv_bias_is_added_before_the_norm(drawn):
    attn = vit_attention(drawn, qkv_bias=True, qk_norm=False)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 4, 20)), jnp.float32)
    kernel, bias = np.asarray(attn.qkv[...]), np.asarray(attn.qkv_bias[...])
    for i, part in enumerate(attn.project(x)):
        expected = np.einsum("bpd,dnh->bpnh", x, kernel[:, i]) + bias[i]
        np.testing.assert_allclose(part, expected, atol=5e-6)


def test_gain_is_layer_scale(drawn):
    attn = vit_attention(drawn)
    rng = np.random.default_rng(4)
    x, gain = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 7, 20), (20,)))
    np.testing.assert_allclose(attn(x, gain=gain), attn(x) * gain, atol=1e-5)


def decoder_attention(drawn, kv_heads, **options):
    defaults = dict(qkv_bias=False, out_bias=False, qk_norm=False, eps=1e-6)
    make = functools.partial(
        DecoderAttention, 16, 4, kv_heads, 6, **{**defaults, **options}, **INIT
    )
    return drawn(lambda rngs: make(rngs=rngs))


def decoder_input():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    rope = rope_tables(jnp.broadcast_to(jnp.arange(5), (2, 5)), 6, 10000.0)
    return x, rope, jnp.tril(jnp.ones((1, 5, 5), bool))


@pytest.mark.parametrize("options", [{}, dict(qkv_bias=True, out_bias=True), dict(qk_norm=True)])
def test_grouped_queries_equal_repeated_heads(drawn, options):
    grouped = decoder_attention(drawn, 2, **options)
    full = decoder_attention(drawn, 4, **options)
    state = nnx.to_pure_dict(nnx.state(grouped))
    for name in ("k", "v", "k_bias", "v_bias"):
        if name in state:
            state[name] = jnp.repeat(state[name], 2, axis=-2)
    target = nnx.state(full)
    nnx.replace_by_pure_dict(target, state)
    nnx.update(full, target)
    y, (k, v) = grouped(*decoder_input())
    expected, _ = full(*decoder_input())
    np.testing.assert_allclose(y, expected, atol=5e-6)
    assert k.shape == v.shape == (2, 5, 2, 6)


@pytest.mark.parametrize("name", ["q_bias", "k_bias", "v_bias", "out_bias"])
def test_every_bias_counts(drawn, name):
    attn = decoder_attention(drawn, 2, qkv_bias=True, out_bias=True)
    before, _ = attn(*decoder_input())
    getattr(attn, name)[...] += 0.1 * jnp.arange(getattr(attn, name).shape[-1])
    assert float(jnp.abs(attn(*decoder_input())[0] - before).max()) > 1e-3


def test_a_constant_on_all_keys_changes_nothing(drawn):
    """Before RoPE a key bias is not the same everywhere; without positions it is."""
    attn = decoder_attention(drawn, 4, qkv_bias=True)
    x, rope, mask = decoder_input()
    still = jax.tree.map(lambda t: t[:, :1] * jnp.ones_like(t), rope)
    before, _ = attn(x, still, mask)
    attn.k_bias[...] += 1.0
    np.testing.assert_allclose(attn(x, still, mask)[0], before, atol=1e-5)


def test_per_head_norm_makes_queries_free_of_their_size(drawn):
    attn = decoder_attention(drawn, 2, qk_norm=True)
    assert attn.q_norm.scale.shape == (6,)
    before, (keys, _) = attn(*decoder_input())
    attn.q[...] *= 3.0
    attn.k[...] *= jnp.asarray([2.0, 5.0])[:, None]  # each head its own factor
    after, (scaled, _) = attn(*decoder_input())
    np.testing.assert_allclose(after, before, atol=1e-4)
    np.testing.assert_allclose(scaled, keys, atol=1e-4)


def test_cache_equals_one_pass(drawn):
    attn = decoder_attention(drawn, 2, qkv_bias=True)
    x, rope, mask = decoder_input()
    whole, _ = attn(x, rope, mask)
    part = lambda a, b: jax.tree.map(lambda t: t[:, a:b], rope)
    head, kv = attn(x[:, :3], part(0, 3), mask[:, :3, :3])
    tail, _ = attn(x[:, 3:], part(3, 5), mask[:, 3:], kv)
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), whole, atol=5e-6)


def test_rows_of_one_image_cross_attend_as_if_it_were_tiled(drawn):
    make = functools.partial(CrossAttention, 16, 4, 4, 10, eps=1e-6, **INIT)
    cross = drawn(lambda rngs: make(rngs=rngs))
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(6, 3, 16)), jnp.float32)
    vision = jnp.asarray(rng.normal(size=(2, 7, 10)), jnp.float32)
    tiled = cross(x, jnp.repeat(vision, 3, axis=0))
    np.testing.assert_allclose(cross(x, vision), tiled, atol=5e-6)
