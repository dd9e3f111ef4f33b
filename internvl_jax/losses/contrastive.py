"""Image-text contrastive losses over the global batch, never holding its B x B logits.

Both losses are per-shard functions: called inside `jax.shard_map` with the mesh axes that the batch
is sharded over, each device compares its b images with all B texts, one chunk of texts at a time,
forwards and backwards. With `axes=()` they are the ordinary single-device losses. Features are
normalised here, in float32, and logits are float32 on every backend: the product costs a thousandth
of a training step even at full precision.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internvl_jax.losses.reduction import (
    Axes,
    gather,
    own_rows,
    shard_sum,
    varying,
    weighted_sum,
)

Metrics = dict[str, Array]


def unit(x: Float[Array, "b E"]) -> Float[Array, "b E"]:
    """Rows scaled to length 1 in float32 (a zero row stays zero)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def softmax_loss(
    image: Float[Array, "b E"],
    text: Float[Array, "b E"],
    log_scale: Float[Array, ""],
    *,
    weights: Float[Array, "b"] | None = None,
    ids: Int[Array, "b"] | None = None,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
    axes: Axes = (),
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric cross-entropy of each image against all texts and each text against all images.

    Source: InternVL section 3.3 (stage 1, and ITC of stage 2); CLIP, arXiv 2103.00020, figure 3.

    Args:
        image: this shard's image features, any float dtype, normalised or not.
        text: features of the same rows' texts.
        log_scale: logarithm of the logit scale (inverse temperature), not clamped here.
        weights: what each row's own loss counts for; they add up to 1 over the global batch. Rows
            of weight 0 stay as negatives of the others. None: the mean over the global batch.
        ids: where given, every text of an image with an equal id is right, with equal weight
            (retrieval fine-tuning); else only the row's own text is.
        label_smoothing: share of the target spread evenly over the global batch.
        chunk: texts compared at a time; the largest temporaries are [b, chunk].
        axes: mesh axes that the rows are sharded over, major first.

    Returns:
        The scalar loss, equal on all shards, and the metrics `i2t_loss`, `t2i_loss`,
        `i2t_accuracy`, `t2i_accuracy` (rows whose best match in the global batch is right).

    Raises:
        ValueError: `chunk` is below 1.
    """
    image, text = unit(image), unit(text)
    scale = jnp.exp(log_scale.astype(jnp.float32))
    texts = gather(text, axes)
    # The scale stays outside the stream, whose gradients are then per shard throughout.
    stream = _merge_columns(_stream(scale * image, texts, chunk, axes), axes)

    own = own_rows(image.shape[0], axes)
    if ids is None:
        i2t_target = t2i_target = stream.own
        i2t_right, t2i_right = stream.row_best == own, stream.column_best == own
    else:
        images, all_ids = gather(image, axes), gather(ids, axes)
        i2t_target = scale * jnp.sum(image * _mean_of_equal(ids, all_ids, texts, chunk, axes), -1)
        t2i_target = scale * jnp.sum(text * _mean_of_equal(ids, all_ids, images, chunk, axes), -1)
        i2t_right, t2i_right = all_ids[stream.row_best] == ids, all_ids[stream.column_best] == ids
    if label_smoothing:
        # The mean logit of a row is its product with the mean feature.
        mean_text, mean_image = (
            shard_sum(jnp.sum(x, 0), axes) / texts.shape[0] for x in (text, image)
        )
        i2t_mean = scale * jnp.sum(image * mean_text, -1)
        t2i_mean = scale * jnp.sum(text * mean_image, -1)
        i2t_target += label_smoothing * (i2t_mean - i2t_target)
        t2i_target += label_smoothing * (t2i_mean - t2i_target)

    # The largest logit cancels against the target first: a small loss keeps its digits.
    row_loss = (stream.row_max - i2t_target) + jnp.log(stream.row_sum)
    column_loss = (stream.column_max - t2i_target) + jnp.log(stream.column_sum)
    i2t = weighted_sum(row_loss, weights, axes)
    t2i = weighted_sum(column_loss, weights, axes)
    return 0.5 * (i2t + t2i), {
        "i2t_loss": i2t,
        "t2i_loss": t2i,
        "i2t_accuracy": weighted_sum(i2t_right.astype(jnp.float32), weights, axes),
        "t2i_accuracy": weighted_sum(t2i_right.astype(jnp.float32), weights, axes),
    }


def sigmoid_loss(
    image: Float[Array, "b E"],
    text: Float[Array, "b E"],
    log_scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    weights: Float[Array, "b"] | None = None,
    chunk: int = 1024,
    axes: Axes = (),
) -> tuple[Float[Array, ""], Metrics]:
    """Pairwise sigmoid loss: each of the B x B pairs is a yes-or-no question.

    Source: SigLIP, arXiv 2303.15343, section 3.2 and algorithm 1.

    Args:
        image: this shard's image features, any float dtype, normalised or not.
        text: features of the same rows' texts.
        log_scale: logarithm of the logit scale (SigLIP starts at log 10).
        bias: added to every logit (SigLIP starts at -10).
        weights: what each image's pairs count for; they add up to 1 over the global batch. The
            texts of weight 0 stay as negatives. None: the mean over the global batch.
        chunk: texts compared at a time; the largest temporaries are [b, chunk].
        axes: mesh axes that the rows are sharded over, major first.

    Returns:
        The scalar loss (sum over texts, weighted over images), equal on all shards, and the
        metrics `i2t_accuracy` and `t2i_accuracy` as in `softmax_loss`.

    Raises:
        ValueError: `chunk` is below 1.
    """
    image, text = unit(image), unit(text)
    rows = jnp.exp(log_scale.astype(jnp.float32)) * image
    bias = varying(bias.astype(jnp.float32), axes)  # its gradient: one sum over shards, not n
    texts = gather(text, axes)

    @jax.checkpoint  # the gradient needs the logits again: a chunk is recomputed, not kept
    def questions(carry: tuple[Array, _Best], piece: _Chunk) -> tuple[tuple[Array, _Best], _Best]:
        sums, best = carry
        logits = _logits(rows, piece) + bias
        # A wrong pair costs -log sigmoid(-z) = softplus(z): nothing for the padding, at -inf.
        sums += jnp.sum(jax.nn.softplus(logits), 1)
        seen = lax.stop_gradient(logits)
        return (sums, _better(best, _best_of(seen, 1, piece.start))), _best_of(seen, 0, 0)

    zeros = varying(jnp.zeros((rows.shape[0],), jnp.float32), axes)
    (wrong, best), columns = lax.scan(
        questions, (zeros, _no_best(rows, axes)), _chunks(texts, chunk)
    )
    own = own_rows(rows.shape[0], axes)
    column_best = _merge_best(_flatten(columns, texts.shape[0]), own, axes).index

    # A right pair costs -log sigmoid(z) = softplus(z) - z.
    loss = wrong - (jnp.sum(rows * text, -1) + bias)
    return weighted_sum(loss, weights, axes), {
        "i2t_accuracy": weighted_sum((best.index == own).astype(jnp.float32), weights, axes),
        "t2i_accuracy": weighted_sum((column_best == own).astype(jnp.float32), weights, axes),
    }


# ---- the stream: one chunk of columns at a time


class _Chunk(NamedTuple):
    """Some columns of the logits."""

    columns: Array  # [c, E]
    keep: Array  # [c] bool, False on padding
    start: Array  # int32, global index of the first


class _Best(NamedTuple):
    """Largest logit along an axis so far, and its global index."""

    value: Array
    index: Array


class _Stream(NamedTuple):
    """What one pass over the logits leaves per row (image) and per column (text).

    A logsumexp is kept as largest logit and sum of exponentials relative to it. The largest logit
    cancels out of their derivative and carries none.
    """

    own: Array  # [b] logit of the row with its own column
    row_max: Array  # [b] over all columns
    row_sum: Array  # [b]
    row_best: Array  # [b] int32, global index of the column of row_max
    column_max: Array  # [B] over this shard's rows; [b] over all rows once merged
    column_sum: Array  # likewise
    column_best: Array  # likewise, int32


def _chunks(columns: Array, chunk: int) -> _Chunk:
    """Columns in pieces of at most `chunk`, on a leading axis; the last one padded with zeros."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} compares nothing: let it be at least 1 column of logits.")
    size, width = columns.shape
    count = -(-size // chunk)
    chunk = -(-size // count)  # as even as possible: 1,100 columns by 1,024 are two times 550
    padded = jnp.pad(columns, ((0, count * chunk - size), (0, 0)))
    index = jnp.arange(count * chunk, dtype=jnp.int32).reshape(count, chunk)
    return _Chunk(padded.reshape(count, chunk, width), index < size, index[:, 0])


def _by_chunk(x: Array, pieces: _Chunk) -> Array:
    """A vector over the columns [B], cut as they are: [n, c]."""
    return jnp.pad(x, (0, pieces.keep.size - x.size)).reshape(pieces.keep.shape)


def _flatten(pieces, size: int):
    """Per-chunk outputs [n, c], put together without the padding: [size]."""
    return jax.tree.map(lambda x: x.reshape(-1)[:size], pieces)


def _logits(rows: Array, piece: _Chunk) -> Array:
    """[b, c] logits, -inf on padding."""
    product = jnp.einsum(
        "bE,cE->bc", rows, piece.columns, precision="highest", preferred_element_type=jnp.float32
    )
    return jnp.where(piece.keep, product, -jnp.inf)


def _is_own(own: Array, piece: _Chunk) -> Array:
    """[b, c] True where a row meets the column of its own index."""
    return own[:, None] == piece.start + jnp.arange(piece.keep.size, dtype=jnp.int32)


def _best_of(logits: Array, axis: int, start: Array | int) -> _Best:
    return _Best(jnp.max(logits, axis), jnp.argmax(logits, axis).astype(jnp.int32) + start)


def _no_best(rows: Array, axes: Axes) -> _Best:
    value = jnp.full((rows.shape[0],), -jnp.inf, jnp.float32)
    return _Best(varying(value, axes), varying(jnp.zeros(value.shape, jnp.int32), axes))


def _better(old: _Best, new: _Best) -> _Best:
    return jax.tree.map(functools.partial(jnp.where, new.value > old.value), new, old)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _stream(rows: Array, columns: Array, chunk: int, axes: Axes) -> _Stream:
    """Statistics of rows @ columns.T along both axes, [b, c] at a time."""
    own = own_rows(rows.shape[0], axes)

    def step(carry: tuple[Array, Array, _Best], piece: _Chunk) -> tuple[tuple, tuple]:
        own_logit, sums, best = carry
        logits = _logits(rows, piece)
        own_logit += jnp.sum(jnp.where(_is_own(own, piece), logits, 0.0), 1)
        better = _better(best, _best_of(logits, 1, piece.start))
        sums *= jnp.exp(best.value - better.value)
        sums += jnp.sum(jnp.exp(logits - better.value[:, None]), 1)
        column = _best_of(logits, 0, 0)
        return (own_logit, sums, better), (column, jnp.sum(jnp.exp(logits - column.value), 0))

    zeros = varying(jnp.zeros((rows.shape[0],), jnp.float32), axes)
    start = (zeros, zeros, _no_best(rows, axes))
    (own_logit, row_sum, row), pieces = lax.scan(step, start, _chunks(columns, chunk))
    column, column_sum = _flatten(pieces, columns.shape[0])
    return _Stream(own_logit, row.value, row_sum, row.index, column.value, column_sum, column.index)


def _stream_forward(rows: Array, columns: Array, chunk: int, axes: Axes):
    out: _Stream = _stream(rows, columns, chunk, axes)
    return out, (rows, columns, out.row_max, out.column_max)


def _stream_backward(chunk: int, axes: Axes, residuals, cotangent: _Stream):
    """The derivative of a sum of exponentials is the exponentials: each chunk's, computed again."""
    rows, columns, row_max, column_max = residuals
    own = own_rows(rows.shape[0], axes)
    pieces = _chunks(columns, chunk)
    product = functools.partial(jnp.einsum, precision="highest")

    def step(d_rows: Array, inputs: tuple[_Chunk, Array, Array]) -> tuple[Array, Array]:
        piece, column_max, d_column_sum = inputs
        logits = _logits(rows, piece)
        d_logits = jnp.exp(logits - row_max[:, None]) * cotangent.row_sum[:, None]
        d_logits += jnp.exp(logits - column_max) * d_column_sum
        d_logits += jnp.where(_is_own(own, piece), cotangent.own[:, None], 0.0)
        d_rows += product("bc,cE->bE", d_logits, piece.columns)
        return d_rows, product("bc,bE->cE", d_logits, rows)

    start = varying(jnp.zeros(rows.shape, jnp.float32), axes)
    inputs = pieces, _by_chunk(column_max, pieces), _by_chunk(cotangent.column_sum, pieces)
    d_rows, d_columns = lax.scan(step, start, inputs)
    return d_rows, d_columns.reshape(-1, columns.shape[1])[: columns.shape[0]]


_stream.defvjp(_stream_forward, _stream_backward)


def _merge_best(best: _Best, own: Array, axes: Axes) -> _Best:
    """Over all shards: every column's largest logit [B], and the best row of own columns [b]."""
    if not axes:
        return best
    top = lax.pmax(lax.stop_gradient(best.value), axes)
    index = lax.pmax(jnp.where(best.value == top, best.index + own[0], -1), axes)
    return _Best(top, index[own])


def _merge_columns(stream: _Stream, axes: Axes) -> _Stream:
    """Column results over all rows of the global batch, kept for this shard's columns."""
    if not axes:
        return stream
    own = own_rows(stream.own.shape[0], axes)
    top, index = _merge_best(_Best(stream.column_max, stream.column_best), own, axes)
    shift = lax.stop_gradient(jnp.exp(stream.column_max - top))
    sums = lax.psum_scatter(stream.column_sum * shift, axes, tiled=True)
    return stream._replace(column_max=top[own], column_sum=sums, column_best=index)


def _mean_of_equal(own: Array, ids: Array, features: Array, chunk: int, axes: Axes) -> Array:
    """Mean of the features [B, E] whose id equals the row's own: [b, E]."""
    pieces = _chunks(features, chunk)

    @jax.checkpoint  # or the equality matrix would be kept for the backward pass
    def step(carry: tuple[Array, Array], inputs: tuple[_Chunk, Array]) -> tuple[tuple, None]:
        sums, counts = carry
        piece, piece_ids = inputs
        equal = ((own[:, None] == piece_ids) & piece.keep).astype(jnp.float32)
        sums += jnp.einsum("bc,cE->bE", equal, piece.columns, precision="highest")
        return (sums, counts + jnp.sum(equal, 1, keepdims=True)), None

    zeros = jnp.zeros((own.shape[0], features.shape[1]), jnp.float32)
    start = varying(zeros, axes), varying(zeros[:, :1], axes)
    (sums, counts), _ = lax.scan(step, start, (pieces, _by_chunk(ids, pieces)))
    return sums / counts
