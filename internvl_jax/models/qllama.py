"""QLLaMA's masks: which of the query block and the text block may look at which.

================================  =====  =====  =====  ======
use                               Q->Q   Q->T   T->Q   T->T
================================  =====  =====  =====  ======
text encoder (no queries)         -      -      -      causal
query features (no text)          full   -      -      -
ITC (both in one row, isolated)   full   no     no     causal
ITM                               full   full   full   full
ITG and generation                full   no     full   causal
================================  =====  =====  =====  ======

Columns of padding are always blocked (https://arxiv.org/abs/2312.14238, section 3.2, and the
masks of the released stage-2 loss).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from internvl_jax.nn.attend import Mask

USES = {
    "itc": dict(q_to_t=False, t_to_q=False, causal=True),
    "itm": dict(q_to_t=True, t_to_q=True, causal=False),
    "itg": dict(q_to_t=False, t_to_q=True, causal=True),
}


def causal_mask(text_mask: jax.Array) -> Mask:
    """Causal mask of a text-only row: bool [B, T], False on padding on either side."""
    return Mask(text_mask.astype(bool), causal=True)


def packed_positions(segment: jax.Array) -> jax.Array:
    """Positions that begin anew with every text of a row: int32 [B, T] -> int32 [B, T]."""
    place = jnp.broadcast_to(jnp.arange(segment.shape[1]), segment.shape)
    first = segment != jnp.pad(segment, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return place - jax.lax.cummax(jnp.where(first, place, 0), axis=1)


def query_text_mask(queries: int, text_mask: jax.Array, use: str) -> jax.Array:
    """Mask of a row [queries][text].

    Args:
        queries: Q, number of query tokens.
        text_mask: bool [B, T], False on padding.
        use: ``itc``, ``itm`` or ``itg`` (see the module's table).

    Returns:
        bool [B, Q + T, Q + T], True where attention is allowed.
    """
    rule = USES[use]
    B, T = text_mask.shape
    text = jnp.tril(jnp.ones((T, T), bool)) if rule["causal"] else jnp.ones((T, T), bool)
    top = jnp.concatenate(
        [jnp.ones((queries, queries), bool), jnp.full((queries, T), rule["q_to_t"])], axis=1
    )
    bottom = jnp.concatenate([jnp.full((T, queries), rule["t_to_q"]), text], axis=1)
    columns = jnp.concatenate([jnp.ones((B, queries), bool), text_mask.astype(bool)], axis=1)
    return jnp.concatenate([top, bottom])[None] & columns[:, None, :]


def positions_of(mask: jax.Array) -> jax.Array:
    """Positions that skip padding on either side: cumsum(mask) - 1, padding set to 1.

    Left-padded rows thus start counting at their first token; bool [B, T] -> int32 [B, T].
    """
    positions = jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return jnp.where(mask.astype(bool), positions, 1)
