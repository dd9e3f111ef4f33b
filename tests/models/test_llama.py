"""The decoder: periods against layers in turn, options of the family, cache, frozen pad row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.models.compute import Compute
from internvl_jax.models.llama import Llama, LlamaConfig
from internvl_jax.models.qllama import causal_mask
from internvl_jax.nn.rope import rope_tables

EXACT = Compute(dtype="float32", remat="none")
CFG = LlamaConfig(vocab_size=20, width=16, depth=5, heads=4, mlp_dim=24)
IDS = jnp.asarray([[1, 7, 3, 2, 0, 0], [1, 4, 9, 11, 5, 2]])
MASK = IDS > 0


def make(drawn, **changes):
    cfg = dataclasses.replace(CFG, **changes)
    return drawn(lambda rngs: Llama(cfg, EXACT, rngs=rngs))


def run(model, ids=IDS, **options):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model(model.embed(ids), positions, causal_mask(ids > 0), **options)


@pytest.mark.parametrize(("frequency", "depth"), [(0, 2), (3, 5), (3, 2)], ids=str)
def test_periods_are_layers_in_turn(drawn, frequency, depth):
    """Every k-th layer cross-attends; scan over periods plus a tail equals a plain loop."""
    model = make(drawn, depth=depth, cross_frequency=frequency, vision_width=12 * (frequency > 0))
    vision = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 12)), jnp.float32)
    queries = 3 if frequency else 0
    vision_or_none = vision if frequency else None
    out = run(model, vision=vision_or_none, queries=queries, collect=True)

    period = max(frequency, 1)
    periods = [model.periods.layer(i) for i in range(depth // period)] + (
        [model.tail] if model.tail is not None else []
    )
    layers = [layer for p in periods for layer in p.layers]
    assert [layer.cross is not None for layer in layers] == [
        frequency > 0 and i % frequency == 0 for i in range(depth)
    ]
    x, rope = model.embed(IDS), rope_tables(jnp.broadcast_to(jnp.arange(6), (2, 6)), 4, 10000.0)
    for i, layer in enumerate(layers):
        x, (k, v) = layer(x, rope, causal_mask(MASK), vision_or_none, queries, None)
        np.testing.assert_allclose(out.layers[i], x, atol=2e-5)
        np.testing.assert_allclose(out.kv[0][i], k, atol=2e-5)
        np.testing.assert_allclose(out.kv[1][i], v, atol=2e-5)
    np.testing.assert_allclose(out.hidden, model.norm(x), atol=2e-5)


def test_a_layer_that_may_cross_attend_touches_only_the_queries(drawn):
    """And it is passed over without vision, or without queries."""
    model = make(drawn, depth=1, cross_frequency=1, vision_width=12)
    vision = jnp.ones((2, 7, 12))
    without = run(model).hidden
    np.testing.assert_array_equal(run(model, vision=vision, queries=0).hidden, without)
    some = run(model, vision=vision, queries=2).hidden
    assert float(jnp.abs(some[:, :2] - without[:, :2]).max()) > 1e-2
    np.testing.assert_allclose(some[:, 2:], without[:, 2:], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(kv_heads=2, head_dim=6, qkv_bias=True, qk_norm=True, depth=2),
        dict(cross_frequency=2, vision_width=12, depth=3),
    ],
    ids=["Qwen", "QLLaMA"],
)
def test_cached_steps_equal_one_pass(drawn, options):
    model = make(drawn, **options)
    ids = jnp.asarray([[1, 7, 3, 5, 6, 2], [1, 4, 9, 11, 5, 2]])
    whole = run(model, ids)
    positions = jnp.broadcast_to(jnp.arange(6), ids.shape)
    mask = jnp.tril(jnp.ones((1, 6, 6), bool))
    cache, parts = None, []
    for a, b in ((0, 4), (4, 6)):
        x = model.embed(ids[:, a:b])
        out = model(x, positions[:, a:b], mask[:, a:b, :b], cache=cache)
        parts.append(out.hidden)
        new = out.kv
        cache = (
            new
            if cache is None
            else tuple(
                jnp.concatenate([old, more], axis=2) for old, more in zip(cache, new, strict=True)
            )
        )
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole.hidden, atol=5e-5)
    np.testing.assert_allclose(cache[0], whole.kv[0], atol=5e-5)


def test_every_option_builds_parameters_it_uses(drawn):
    model = make(
        drawn, kv_heads=2, head_dim=6, qkv_bias=True, out_bias=True, qk_norm=True, tied_head=True
    )
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state):
        model = nnx.merge(graphdef, state)
        return jnp.sum(jnp.sin(model.logits(run(model).hidden)))

    for path, leaf in nnx.to_flat_state(jax.grad(loss)(state)):
        assert float(jnp.abs(leaf.get_value()).max()) > 1e-5, "/".join(map(str, path))


def test_heads(drawn):
    untied, tied = make(drawn), make(drawn, tied_head=True)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16)), jnp.float32)
    np.testing.assert_allclose(untied.logits(hidden), hidden @ untied.lm_head[...], atol=1e-5)
    assert tied.lm_head is None
    np.testing.assert_allclose(tied.logits(hidden), hidden @ tied.embedding[...].T, atol=1e-5)
    with pytest.raises(ValueError, match="built without an output head"):
        make(drawn, head=False).logits(hidden)


def test_logits_are_float32_in_bfloat16(drawn):
    model = drawn(lambda rngs: Llama(CFG, Compute(dtype="bfloat16", remat="none"), rngs=rngs))
    hidden = run(model).hidden
    assert hidden.dtype == jnp.bfloat16
    logits = model.logits(hidden)
    assert logits.dtype == jnp.float32
    exact = drawn(lambda rngs: Llama(CFG, EXACT, rngs=rngs))
    expected = exact.logits(run(exact).hidden)
    scale = float(jnp.abs(expected).max())
    assert float(jnp.abs(logits - expected).max()) < 0.05 * scale


@pytest.mark.parametrize("pad", [0, None, 3])
def test_the_pad_row_receives_no_gradient(drawn, pad):
    model = make(drawn, depth=1, pad_id=pad)
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state):
        model = nnx.merge(graphdef, state)
        return jnp.sum(model.embed(IDS) * 2.0)

    grads = np.asarray(jax.grad(loss)(state)["embedding"].get_value())
    used = {int(i) for i in np.unique(IDS)} - {pad}
    assert {i for i in range(20) if np.any(grads[i])} == used


def test_padding_columns_are_never_read(drawn):
    model = make(drawn)
    other = IDS.at[0, 4:].set(5)
    positions = jnp.broadcast_to(jnp.arange(6), IDS.shape)
    a, b = (model(model.embed(i), positions, causal_mask(MASK)).hidden for i in (IDS, other))
    np.testing.assert_array_equal(a[0, :4], b[0, :4])
