"""Beam search with the outcome of transformers 4.37.2, its walk over candidates written as sorts.

Per example K beams are open; K x V continuations compete. Of the best 2K, an EOS among the first K
closes its beam into a hypothesis, an EOS further down is dropped, and the first K others are the
next open beams (there are always that many: each beam offers one EOS). The K best closed
hypotheses are kept; when an example may stop is `Settings.early_stopping`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl_jax.generate.cache import Cache, Start, make_cache, step
from internvl_jax.generate.choice import forbid_eos, length_divisor
from internvl_jax.generate.settings import Settings
from internvl_jax.models.llama import Llama


class Hypotheses(NamedTuple):
    """Closed beams: ids [B, K, T], lengths [B, K] with EOS, scores [B, K] (-inf: there is none)."""

    ids: jax.Array
    lengths: jax.Array
    scores: jax.Array


class Beams(NamedTuple):
    """Open beams, best first, and what has been closed.

    Attributes:
        step: tokens chosen so far.
        ids: int32 [B, K, T].
        log_p: float32 [B, K], their sum.
        parent: int32 [B, K], which beam of the step before each one continues.
        closed: the best hypotheses so far, best first.
        done: bool [B], nothing open can win any more.
    """

    step: jax.Array
    ids: jax.Array
    log_p: jax.Array
    parent: jax.Array
    closed: Hypotheses
    done: jax.Array


def search(llm: Llama, start: Start, settings: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Best hypothesis of every prompt.

    Args:
        llm: the decoder that read the prompts.
        start: B prompts.
        settings: K = num_beams, T = max_new_tokens and the rest.

    Returns:
        ids int32 [B, T], lengths int32 [B] with EOS, scores float32 [B].
    """
    B, K, T = start.logits.shape[0], settings.num_beams, settings.max_new_tokens
    first = jnp.arange(B)[:, None] * K  # row of each example's beam 0

    def proceed(carry: tuple[Beams, Cache]) -> tuple[Beams, Cache]:
        beams, cache = carry
        token = jnp.take(beams.ids, beams.step - 1, axis=2).reshape(B * K)
        logits, cache = step(llm, token, cache.take((first + beams.parent).reshape(B * K)))
        return advance(beams, logits.reshape(B, K, -1), settings), cache

    ids = jnp.full((B, K, T), settings.pad_id, jnp.int32)
    beams = Beams(
        step=jnp.zeros((), jnp.int32),
        ids=ids,
        # All beams begin alike: only the first one counts, or all would choose the same token.
        log_p=jnp.tile(jnp.where(jnp.arange(K) == 0, 0.0, -1e9), (B, 1)),
        parent=jnp.zeros((B, K), jnp.int32),
        closed=Hypotheses(ids, jnp.zeros((B, K), jnp.int32), jnp.full((B, K), -jnp.inf)),
        done=jnp.zeros(B, bool),
    )
    beams = advance(beams, jnp.repeat(start.logits[:, None], K, axis=1), settings)
    beams, _ = jax.lax.while_loop(
        lambda carry: (carry[0].step < T) & ~jnp.all(carry[0].done),
        proceed,
        (beams, make_cache(start, T - 1, copies=K)),
    )
    # Beams still open at the limit compete as they are; a finished example's do not.
    scores = beams.log_p / length_divisor(T + settings.count_seed, settings)
    scores = jnp.where(beams.done[:, None], -jnp.inf, scores)
    best = _best(beams.closed, Hypotheses(beams.ids, jnp.full((B, K), T, jnp.int32), scores), 1)
    return best.ids[:, 0], best.lengths[:, 0], best.scores[:, 0]


def advance(beams: Beams, logits: jax.Array, settings: Settings) -> Beams:
    """One step of the search: float32 logits [B, K, V] of the open beams -> the next ones."""
    B, K, V = logits.shape
    log_p = forbid_eos(jax.nn.log_softmax(logits), beams.step, settings) + beams.log_p[..., None]
    log_p, index = jax.lax.top_k(log_p.reshape(B, K * V), 2 * K)
    parent, token = jnp.divmod(index.astype(jnp.int32), V)
    ends = token == settings.eos_id
    ids = jnp.take_along_axis(beams.ids, parent[..., None], axis=1).at[:, :, beams.step].set(token)

    divisor = length_divisor(beams.step + 1, settings)
    closes = ends[:, :K] & ~beams.done[:, None]
    scores = jnp.where(closes, log_p[:, :K] / divisor, -jnp.inf)
    lengths = jnp.full((B, K), beams.step + 1, jnp.int32)
    closed = _best(beams.closed, Hypotheses(ids[:, :K], lengths, scores), K)

    full = closed.scores[:, -1] > -jnp.inf
    if settings.early_stopping is not True:
        if settings.early_stopping == "never":
            limit = settings.max_new_tokens + settings.count_seed
            longest = length_divisor(limit, settings)
            divisor = jnp.where(settings.length_penalty > 0, longest, divisor)
        full &= closed.scores[:, -1] >= log_p[:, 0] / divisor

    follow = jnp.argsort(ends, axis=1, stable=True)[:, :K]
    take = lambda a: jnp.take_along_axis(a, follow.reshape(B, K, *(1,) * (a.ndim - 2)), axis=1)
    return Beams(beams.step + 1, take(ids), take(log_p), take(parent), closed, beams.done | full)


def _best(old: Hypotheses, new: Hypotheses, keep: int) -> Hypotheses:
    """The best `keep` of both, the older first where they tie."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    scores, index = jax.lax.top_k(both.scores, keep)
    ids = jnp.take_along_axis(both.ids, index[..., None], axis=1)
    return Hypotheses(ids, jnp.take_along_axis(both.lengths, index, axis=1), scores)
