"""Image-text matching: does this text describe this image?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from internvl_jax.losses.reduction import weighted_sum


def matching_loss(
    logits: Float[Array, "R C"],
    labels: Int[Array, "R"],
    *,
    weights: Float[Array, "R"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of matched (class 1) and mismatched (class 0) pairs.

    Source: InternVL section 3.3 (ITM), after BLIP-2, arXiv 2301.12597, section 3.2.

    Args:
        logits: any float dtype; C = 2.
        labels: class of each row.
        weights: what each row counts for, adding up to 1; None: all the same.

    Returns:
        The scalar loss in float32, and the metric `accuracy`, weighted alike.
    """
    logits = logits.astype(jnp.float32)
    right = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    loss = weighted_sum(jax.nn.logsumexp(logits, 1) - right, weights)
    hits = (jnp.argmax(logits, 1) == labels).astype(jnp.float32)
    return loss, {"accuracy": weighted_sum(hits, weights)}


def sample_hard_negatives(
    similarity: Float[Array, "R C"],
    ids: Int[Array, "R"],
    key: Key[Array, ""],
    *,
    column_ids: Int[Array, "C"] | None = None,
) -> Int[Array, "R"]:
    """For each image, another image's text, drawn in proportion to exp(similarity).

    Source: ALBEF, arXiv 2107.07651, section 3.2; BLIP-2 draws alike. (InternVL's released loader
    draws negatives uniformly.)

    Args:
        similarity: logits of images (rows) against candidate texts (columns).
        ids: what each row shows; candidates of an equal id are no negatives.
        key: a jax random key.
        column_ids: the candidates' ids; None: those of the rows.

    Returns:
        int32 column of the drawn text; -1 for a row whose candidates all have its own id.
    """
    wrong: Bool[Array, "R C"] = ids[:, None] != (ids if column_ids is None else column_ids)
    drawn = jax.random.categorical(key, jnp.where(wrong, similarity.astype(jnp.float32), -jnp.inf))
    return jnp.where(jnp.any(wrong, 1), drawn, -1).astype(jnp.int32)
