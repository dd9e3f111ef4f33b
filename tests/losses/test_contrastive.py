"""Streamed, sharded contrastive losses against the full matrix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from internvl_jax.losses.contrastive import sigmoid_loss, softmax_loss, unit

MESHES = [
    pytest.param((8,), ("a",), ("a",), id="8"),
    pytest.param((2, 4), ("a", "b"), ("a", "b"), id="2x4"),
    pytest.param((4, 2), ("a", "b"), ("b", "a"), id="4x2-minor-first"),
    pytest.param((2, 2, 2), ("a", "b", "c"), ("a", "b"), id="2x2-unused-2"),
]


def full_softmax(image, text, log_scale, weights=None, ids=None, label_smoothing=0.0):
    """The whole matrix, soft targets written out."""
    logits = jnp.exp(log_scale) * unit(image) @ unit(text).T
    B = len(logits)
    targets = jnp.eye(B) if ids is None else (ids[:, None] == ids[None]).astype(jnp.float32)
    targets = targets / targets.sum(1, keepdims=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / B
    weights = jnp.full(B, 1 / B) if weights is None else weights
    rows = -(targets * jax.nn.log_softmax(logits, 1)).sum(1)
    columns = -(targets * jax.nn.log_softmax(logits.T, 1)).sum(1)
    return 0.5 * (weights @ rows + weights @ columns)


def full_sigmoid(image, text, log_scale, bias, weights=None):
    logits = jnp.exp(log_scale) * unit(image) @ unit(text).T + bias
    B = len(logits)
    weights = jnp.full(B, 1 / B) if weights is None else weights
    return -(weights[:, None] * jax.nn.log_sigmoid((2 * jnp.eye(B) - 1) * logits)).sum()


def features(B: int, E: int = 16, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shared = jax.random.normal(keys[0], (B, E))
    image, text = (shared + jax.random.normal(k, (B, E)) for k in keys[1:])
    return image, text, jnp.float32(np.log(1 / 0.07))


def kept(B: int) -> jax.Array:
    """Weights with every third row left out."""
    keep = (jnp.arange(B) % 3 != 1).astype(jnp.float32)
    return keep / keep.sum()


def assert_close(got, want, rtol: float):
    """Tolerance relative to the largest magnitude of each reference array."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * max(float(jnp.abs(w).max()), 1e-30))


def check(loss, full, args, extra, scalars: int, mesh=None, axes=(), specs=None):
    """Values to 1e-6 and gradients to 1e-5, on one device or in shards."""
    if mesh is None:
        run = lambda args, extra: loss(*args, **extra)[0]
    else:
        rows = P(axes)
        in_specs = ((rows, rows, *(P(),) * scalars), dict.fromkeys(extra, rows))
        run = jax.shard_map(
            lambda args, extra: loss(*args, **extra, axes=axes)[0],
            mesh=mesh,
            in_specs=in_specs,
            out_specs=P(),
        )
    grad = jax.jit(jax.value_and_grad(run))
    want = jax.jit(jax.value_and_grad(lambda args, extra: full(*args, **extra)))(args, extra)
    got = grad(args, extra)
    assert_close(got[0], want[0], 1e-6)
    assert_close(got[1], want[1], 1e-5)


CASES = {  # array arguments by batch size, label smoothing
    "plain": (lambda B: {}, 0.0),
    "weights": (lambda B: {"weights": kept(B)}, 0.0),
    "smoothing": (lambda B: {"weights": kept(B)}, 0.1),
    "ids": (lambda B: {"ids": jnp.arange(B, dtype=jnp.int32) * 5 % 7}, 0.0),
    "all": (lambda B: {"ids": jnp.arange(B, dtype=jnp.int32) // 2, "weights": kept(B)}, 0.1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("B", "chunk"), [(24, 24), (23, 5), (5, 1)])
def test_softmax_equals_the_full_matrix(B: int, chunk: int, case: str):
    extra, smoothing = CASES[case]
    loss = functools.partial(softmax_loss, chunk=chunk, label_smoothing=smoothing)
    full = functools.partial(full_softmax, label_smoothing=smoothing)
    check(loss, full, features(B), extra(B), 1)


@pytest.mark.parametrize("case", ["plain", "smoothing", "all"])
@pytest.mark.parametrize(("shape", "names", "axes"), MESHES)
def test_softmax_in_shards(shape, names, axes, case: str):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    extra, smoothing = CASES[case]
    loss = functools.partial(softmax_loss, chunk=10, label_smoothing=smoothing)
    full = functools.partial(full_softmax, label_smoothing=smoothing)
    check(loss, full, features(32), extra(32), 1, mesh, axes)


def test_a_batch_of_one_costs_nothing():
    assert jax.jit(softmax_loss)(*features(1))[0] == 0


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk=0"):
        softmax_loss(*features(4), chunk=0)


def test_a_small_loss_keeps_its_digits():
    """With every pair right, what is left lies near the rounding of the logits."""
    image = jnp.eye(8) + 0.1 * jax.random.normal(jax.random.key(0), (8, 8))
    args = image, image, jnp.float32(np.log(20))
    assert 0 < full_softmax(*args) < 1e-5
    assert_close(
        jax.jit(functools.partial(softmax_loss, chunk=3))(*args)[0], full_softmax(*args), 1e-2
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("B", "chunk"), [(24, 24), (23, 5)])
def test_sigmoid_equals_the_full_matrix(B: int, chunk: int, weighted: bool):
    args = (*features(B), jnp.float32(-3.0))
    extra = {"weights": kept(B)} if weighted else {}
    check(functools.partial(sigmoid_loss, chunk=chunk), full_sigmoid, args, extra, 2)


@pytest.mark.parametrize(("shape", "names", "axes"), MESHES)
def test_sigmoid_in_shards(shape, names, axes):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    args = (*features(32), jnp.float32(-3.0))
    extra = {"weights": kept(32)}
    check(functools.partial(sigmoid_loss, chunk=10), full_sigmoid, args, extra, 2, mesh, axes)


@pytest.mark.parametrize(
    "loss", [softmax_loss, functools.partial(sigmoid_loss, bias=jnp.float32(-1))]
)
@pytest.mark.parametrize(("shape", "names", "axes"), MESHES)
def test_accuracy(shape, names, axes, loss):
    image, text, scale = features(64, E=8, seed=1)
    logits = np.asarray(unit(image) @ unit(text).T)
    want = [np.mean(logits.argmax(axis) == np.arange(64)) for axis in (1, 0)]
    assert 0.1 < want[0] < 0.9 and want[0] != want[1]
    _, metrics = jax.jit(functools.partial(loss, chunk=9))(image, text, scale)
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    _, sharded = jax.jit(
        jax.shard_map(
            lambda i, t: loss(i, t, scale, chunk=9, axes=axes),
            mesh=mesh,
            in_specs=P(axes),
            out_specs=P(),
        )
    )(image, text)
    for got in (metrics, sharded):
        assert [got["i2t_accuracy"], got["t2i_accuracy"]] == pytest.approx(want)


def test_accuracy_takes_any_text_of_the_image():
    image = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    text = image[jnp.array([1, 0, 2])]
    ids = jnp.array([4, 4, 9], jnp.int32)
    loss = jax.jit(softmax_loss)
    scale = jnp.float32(3.0)
    assert loss(image, text, scale)[1]["i2t_accuracy"] == pytest.approx(1 / 3)
    assert loss(image, text, scale, ids=ids)[1]["i2t_accuracy"] == pytest.approx(1)
    assert loss(image, text, scale, ids=ids)[1]["t2i_accuracy"] == pytest.approx(1)


def test_ranks_with_their_own_counts():
    """Weights reproduce the official mean of ranks' means, each over its own kept rows."""
    image, text, scale = features(12)
    keep = np.array([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1], np.float32)
    logits = jnp.exp(scale) * unit(image) @ unit(text).T
    per_rank = []
    for rank in (slice(0, 6), slice(6, 12)):
        both = [-jnp.diag(jax.nn.log_softmax(x, 1))[rank] for x in (logits, logits.T)]
        per_rank.append(sum((b * keep[rank]).sum() / keep[rank].sum() for b in both) / 2)
    weights = np.concatenate([keep[:6] / keep[:6].sum(), keep[6:] / keep[6:].sum()]) / 2
    run = jax.jit(functools.partial(softmax_loss, chunk=5))
    loss, _ = run(image, text, scale, weights=jnp.asarray(weights))
    assert_close(loss, sum(per_rank) / 2, 1e-6)


@pytest.mark.parametrize(
    "loss", [softmax_loss, functools.partial(sigmoid_loss, bias=jnp.float32(-1))]
)
def test_nothing_kept_is_zero(loss):
    image, text, scale = features(8)
    run = lambda *a: loss(*a, weights=jnp.zeros(8), chunk=3)[0]
    value, grads = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(image, text, scale)
    assert value == 0
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def test_a_large_scale_stays_finite():
    image, text, _ = features(16)
    run = lambda i, t, s: softmax_loss(i, t, s, chunk=5)[0]
    args = image, text, jnp.float32(np.log(1e4))
    value, grads = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(*args)
    want = jax.jit(jax.value_and_grad(full_softmax, (0, 1, 2)))(*args)
    assert_close(value, want[0], 1e-6)
    assert_close(grads, want[1], 1e-4)


def test_bfloat16_features_are_compared_in_float32():
    image, text, scale = features(16)
    low = image.astype(jnp.bfloat16), text.astype(jnp.bfloat16)
    run = lambda i, t: softmax_loss(i, t, scale)[0]
    value, grads = jax.jit(jax.value_and_grad(run, (0, 1)))(*low)
    assert value.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    assert_close(value, full_softmax(*low, scale), 1e-6)


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize("kind", ["softmax", "soft targets", "sigmoid"])
def test_memory_holds_a_chunk(kind: str, shards: int):
    """Temporaries of loss and gradient stay far below this shard's rows of the B x B matrix."""
    B, E, chunk = 4096, 8, 256
    rows = jax.ShapeDtypeStruct((B, E), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    axes = ("a",) if shards > 1 else ()

    def loss(image, text, scale):
        options = {"chunk": chunk, "axes": axes}
        if kind == "sigmoid":
            return sigmoid_loss(image, text, scale, -10.0 * jnp.ones(()), **options)[0]
        ids = jnp.arange(len(image), dtype=jnp.int32) // 2 if kind == "soft targets" else None
        return softmax_loss(image, text, scale, ids=ids, **options)[0]

    run = loss
    if shards > 1:
        mesh = jax.make_mesh((shards,), axes, axis_types=(AxisType.Auto,))
        run = jax.shard_map(loss, mesh=mesh, in_specs=(P("a"), P("a"), P()), out_specs=P())
    temporaries = lambda f: (
        jax.jit(jax.grad(f, (0, 1, 2)))
        .lower(rows, rows, scalar)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    matrix = 4 * B * B // shards
    # A few buffers of [b, chunk], and [B, E] arrays.
    assert temporaries(run) < 5 * matrix * chunk // B + 16 * 4 * B * E
    assert temporaries(run) < matrix / 2
    if shards == 1 and kind == "softmax":
        assert temporaries(full_softmax) > matrix
