"""Next-token cross-entropy on unshifted labels (ITG of stage 2, dialogue of stage 3)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internvl_jax.losses.reduction import Axes, shard_sum, varying

IGNORE = -100  # label of a position that is not learned


class TokenTotals(NamedTuple):
    """Sums over learned tokens, float32 scalars; divide by the global count for means."""

    loss: Array  # of each token's cross-entropy, times its row's weight
    count: Array  # learned tokens, unweighted
    correct: Array  # tokens whose best logit is the label, unweighted


def next_token_loss(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    *,
    row_weights: Float[Array, "B"] | None = None,
) -> TokenTotals:
    """Cross-entropy of each position's logits against the next position's label.

    Source: InternVL section 3.3 (ITG); Hugging Face's convention for labels.

    Args:
        logits: any float dtype, position t predicts label t + 1.
        labels: unshifted: the token at the same position, IGNORE where it is not learned.
        row_weights: multiplies the losses of a row's tokens; None: 1.
    """
    return _totals(logits[:, :-1], labels[:, 1:], row_weights)


def chunked_next_token_loss(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    *,
    chunk: int = 4096,
    row_weights: Float[Array, "B"] | None = None,
    axes: Axes = (),
) -> TokenTotals:
    """`next_token_loss` of ``hidden @ kernel``, without ever holding all of these logits.

    A few positions of every row are done at a time, so that a batch stays sharded as it is; their
    logits are computed again for the gradient.

    Args:
        hidden: final hidden states in the compute dtype, which is also the product's; its result
            is float32.
        kernel: output head, any float dtype.
        labels: unshifted, IGNORE where not learned.
        chunk: tokens whose logits exist at a time, at least one per row; inside `jax.shard_map`
            they are the shard's, and the gradient of the kernel is summed over shards once, not
            per chunk.
        row_weights: multiplies the losses of a row's tokens; None: 1.
        axes: mesh axes that the rows are sharded over, where called per shard.
    """
    B, T, D = hidden.shape
    count = max(1, -(-(T - 1) // max(1, chunk // B)))
    size = -(-(T - 1) // count)
    pad = count * size - (T - 1)

    hidden = jnp.pad(hidden[:, :-1], ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, pad)), constant_values=IGNORE)
    pieces = (
        jnp.moveaxis(hidden.reshape(B, count, size, D), 1, 0),
        jnp.moveaxis(targets.reshape(B, count, size), 1, 0),
    )

    # Typed per shard before the loop, so that its gradient is summed over shards after it.
    kernel = varying(kernel, axes)

    def add(totals: TokenTotals, hidden: Array, targets: Array) -> TokenTotals:
        logits = jnp.einsum(
            "BTD,DV->BTV", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return jax.tree.map(jnp.add, totals, _totals(logits, targets, row_weights))

    @jax.checkpoint
    def step(totals: TokenTotals, piece: tuple[Array, Array]) -> tuple[TokenTotals, None]:
        # Prompts and pictures come first: there, often no row has anything to learn.
        anything = jnp.any(piece[1] != IGNORE)
        return lax.cond(anything, add, lambda totals, *_: totals, totals, *piece), None

    zero = varying(jnp.zeros((), jnp.float32), axes)
    totals, _ = lax.scan(step, TokenTotals(zero, zero, zero), pieces)
    return jax.tree.map(lambda x: shard_sum(x, axes), totals)


def _totals(logits: Array, targets: Array, row_weights: Array | None) -> TokenTotals:
    logits = logits.astype(jnp.float32)
    learned = targets != IGNORE
    # A comparison instead of an index: it stays local where the vocabulary is sharded.
    vocabulary = lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    right = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), -1)
    loss = jnp.where(learned, jax.nn.logsumexp(logits, -1) - right, 0.0)
    if row_weights is not None:
        loss = loss * row_weights[:, None]
    correct = (jnp.argmax(logits, -1) == targets) & learned
    return TokenTotals(
        jnp.sum(loss), jnp.sum(learned, dtype=jnp.float32), jnp.sum(correct, dtype=jnp.float32)
    )
