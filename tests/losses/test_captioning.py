"""Next-token losses against a plain implementation, and what the chunks save."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.losses.captioning import IGNORE, chunked_next_token_loss, next_token_loss


def sample(B: int = 6, T: int = 11, D: int = 8, V: int = 13):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    kernel = jax.random.normal(keys[1], (D, V))
    labels = jax.random.randint(keys[2], (B, T), 0, V)
    learned = jax.random.bernoulli(keys[3], 0.6, (B, T))
    return hidden, kernel, jnp.where(learned, labels, IGNORE)


def plain(hidden, kernel, labels, row_weights):
    """Token by token, in float64 NumPy."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    loss, count, correct = 0.0, 0, 0
    for row, (z, y) in enumerate(zip(logits, np.asarray(labels), strict=True)):
        for t in range(len(y) - 1):
            if y[t + 1] != IGNORE:
                loss += row_weights[row] * (np.log(np.exp(z[t]).sum()) - z[t][y[t + 1]])
                correct += z[t].argmax() == y[t + 1]
                count += 1
    return loss, count, correct


@pytest.mark.parametrize("chunk", [1, 12, 25, 1000])
def test_chunked_equals_plain(chunk: int):
    hidden, kernel, labels = sample()
    weights = jnp.linspace(0.5, 1.5, len(hidden))
    want = plain(hidden, kernel, labels, np.asarray(weights))
    run = jax.jit(lambda *a: chunked_next_token_loss(*a, chunk=chunk, row_weights=weights))
    np.testing.assert_allclose(np.array(run(hidden, kernel, labels)), want, rtol=1e-6)

    whole = lambda h, k: next_token_loss(h @ k, labels, row_weights=weights).loss
    pieces = lambda h, k: run(h, k, labels).loss
    np.testing.assert_allclose(whole(hidden, kernel), want[0], rtol=1e-6)
    for got, grad in zip(
        jax.jit(jax.grad(pieces, (0, 1)))(hidden, kernel),
        jax.jit(jax.grad(whole, (0, 1)))(hidden, kernel),
        strict=True,
    ):
        np.testing.assert_allclose(got, grad, rtol=0, atol=1e-5 * np.abs(grad).max())


def test_the_first_label_and_the_last_position_do_not_count():
    hidden, kernel, labels = sample()
    run = jax.jit(chunked_next_token_loss)
    before = run(hidden, kernel, labels)
    after = run(hidden.at[:, -1].set(99.0), kernel, labels.at[:, 0].set(3))
    np.testing.assert_array_equal(np.array(before), np.array(after))


def test_nothing_learned_is_zero():
    hidden, kernel, labels = sample()
    run = lambda h: chunked_next_token_loss(h, kernel, jnp.full_like(labels, IGNORE), chunk=12)
    grad, totals = jax.jit(jax.grad(lambda h: (run(h).loss, run(h)), has_aux=True))(hidden)
    assert not np.any(grad) and not np.any(np.array(totals))


def test_one_token_has_no_next():
    hidden, kernel, labels = sample(T=1)
    assert not np.any(np.array(chunked_next_token_loss(hidden, kernel, labels)))


def test_bfloat16_hidden_gives_float32_logits():
    hidden, kernel, labels = sample()
    hidden, kernel = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    got = jax.jit(chunked_next_token_loss)(hidden, kernel.astype(jnp.float32), labels)
    assert got.loss.dtype == jnp.float32
    # bfloat16 values, but neither the product nor the softmax is rounded to bfloat16.
    want = plain(hidden.astype(jnp.float32), kernel.astype(jnp.float32), labels, np.ones(6))
    np.testing.assert_allclose(np.array(got), want, rtol=1e-5)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "model")])
def test_sharded_batch_and_vocabulary(spec: P):
    """Under jit with sharded inputs, the sums are those of one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    hidden, kernel, labels = sample(B=8, V=14)
    rows, matrix = NamedSharding(mesh, P(spec[0])), NamedSharding(mesh, P(None, spec[1]))
    loss = lambda h, k, y: chunked_next_token_loss(h, k, y, chunk=24).loss
    grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
    want = grad(hidden, kernel, labels)
    got = grad(*jax.device_put((hidden, kernel, labels), (rows, matrix, rows)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * np.abs(w).max())


def scans(jaxpr) -> Iterator[str]:
    """The text of every loop in a traced function."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield str(eqn.params["jaxpr"])
        for inner in eqn.params.values():
            if hasattr(inner, "eqns"):
                yield from scans(inner)


@pytest.mark.parametrize(
    ("shape", "axes"), [((8,), ("a",)), ((2, 4), ("a", "b")), ((2, 2, 2), ("a", "b"))]
)
def test_per_shard(shape, axes):
    """Inside shard_map, sums and gradients are the global ones, and the kernel's is summed once."""
    mesh = jax.make_mesh(
        shape, ("a", "b", "c")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape)
    )
    hidden, kernel, labels = sample(B=16)
    weights = jnp.linspace(0.5, 1.5, 16)
    total = lambda h, k, y, w, **more: chunked_next_token_loss(h, k, y, row_weights=w, **more)
    rows = P(axes)
    sharded = jax.shard_map(
        lambda *a: total(*a, chunk=6, axes=axes),
        mesh=mesh,
        in_specs=(rows, P(), rows, rows),
        out_specs=P(),
    )
    args = hidden, kernel, labels, weights
    grad = lambda f: jax.jit(jax.value_and_grad(lambda *a: f(*a).loss, (0, 1)))
    run = grad(sharded)
    got, want = jax.tree.leaves(run(*args)), jax.tree.leaves(grad(total)(*args))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * np.abs(w).max())
    np.testing.assert_array_equal(np.array(sharded(*args))[1:], np.array(total(*args))[1:])
    loops = list(scans(jax.make_jaxpr(run)(*args)))
    assert len(loops) >= 2 and not any("psum" in loop for loop in loops)


def test_memory_holds_a_chunk():
    B, T, D, V = 16, 64, 16, 4096
    shapes = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )

    def temporaries(loss) -> int:
        grad = jax.jit(jax.grad(loss, (0, 1)))
        return grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporaries(lambda h, k, y: next_token_loss(h @ k, y).loss) >= logits
    chunked = lambda h, k, y: chunked_next_token_loss(h, k, y, chunk=B * 4).loss
    assert temporaries(chunked) < logits / 4
