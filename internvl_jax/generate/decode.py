"""From a prompt to new tokens: greedy search and sampling, jitted with static shapes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from internvl_jax.generate import beam
from internvl_jax.generate.cache import Cache, Start, make_cache, step
from internvl_jax.generate.choice import filter_logits, forbid_eos, length_divisor
from internvl_jax.generate.settings import Settings
from internvl_jax.models.llama import Llama


class Generated(NamedTuple):
    """What a search returns.

    Attributes:
        ids: int32 [B, T], the new tokens with their EOS, then padding; one column more, in front,
            where `Settings.bos_id` is set.
        lengths: int32 [B], new tokens with their EOS.
        scores: float32 [B], sum(log p) / length ** length_penalty under the unfiltered model.
        logits: float32 [T, B, V] that each token was chosen from (greedy, sampling; only where
            asked for): EOS at -inf before `min_new_tokens`; ended rows go on with pads.
    """

    ids: jax.Array
    lengths: jax.Array
    scores: jax.Array
    logits: jax.Array | None


def decode(
    llm: Llama,
    start: Start,
    settings: Settings,
    key: Key[Array, ""] | None = None,
    *,
    logits: bool = False,
) -> Generated:
    """Continues prompts; compiled once per shapes and per the settings in `choice.STATIC`.

    Args:
        llm: the decoder that read the prompts.
        start: B prompts.
        settings: how to search.
        key: what sampling draws from; row b's draws depend on (key, b, step) alone.
        logits: return the logits each token was chosen from; not with beams.

    Raises:
        ValueError: sampling without a key, or logits of a beam search.
    """
    if settings.do_sample and key is None:
        raise ValueError("do_sample=True draws from a key: pass key=jax.random.key(seed).")
    if logits and settings.num_beams > 1:
        raise ValueError("A beam search has no logits of its tokens to return: use num_beams=1.")
    graphdef, state = nnx.split(llm)
    key = jax.random.key(0) if key is None else key
    return _decode(graphdef, state, start, settings, key, logits)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _decode(
    graphdef: Any, state: Any, start: Start, settings: Settings, key: jax.Array, logits: bool
) -> Generated:
    llm = nnx.merge(graphdef, state)
    if settings.num_beams > 1:
        generated = Generated(*beam.search(llm, start, settings), None)
    else:
        generated = _search(llm, start, settings, key, logits)
    if settings.bos_id is None:
        return generated
    seed = jnp.full((generated.ids.shape[0], 1), settings.bos_id, jnp.int32)
    return generated._replace(ids=jnp.concatenate([seed, generated.ids], axis=1))


class _Row(NamedTuple):
    """State of the loop, one row per prompt; `step` counts the tokens chosen."""

    step: jax.Array
    token: jax.Array
    ids: jax.Array
    lengths: jax.Array
    log_p: jax.Array
    done: jax.Array
    logits: jax.Array | None


def _search(llm: Llama, start: Start, settings: Settings, key: jax.Array, keep: bool) -> Generated:
    B, V = start.logits.shape
    T = settings.max_new_tokens

    def choose(logits: jax.Array, row: _Row) -> _Row:
        allowed = forbid_eos(logits, row.step, settings)
        if settings.do_sample:
            keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(key, b), row.step))
            filtered = filter_logits(allowed, settings.temperature, settings.top_k, settings.top_p)
            token = jax.vmap(jax.random.categorical)(keys(jnp.arange(B)), filtered)
        else:
            token = jnp.argmax(allowed, axis=-1)
        token = jnp.where(row.done, settings.pad_id, token).astype(jnp.int32)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return _Row(
            step=row.step + 1,
            token=token,
            ids=row.ids.at[:, row.step].set(token),
            lengths=row.lengths + ~row.done,
            log_p=row.log_p + jnp.where(row.done, 0.0, log_p),
            done=row.done | (token == settings.eos_id),
            logits=None if row.logits is None else row.logits.at[row.step].set(allowed),
        )

    def advance(carry: tuple[_Row, Cache]) -> tuple[_Row, Cache]:
        row, cache = carry
        logits, cache = step(llm, row.token, cache)
        return choose(logits, row), cache

    row = _Row(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(B, jnp.int32),
        ids=jnp.full((B, T), settings.pad_id, jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        log_p=jnp.zeros(B, jnp.float32),
        done=jnp.zeros(B, bool),
        logits=jnp.zeros((T, B, V), jnp.float32) if keep else None,
    )
    row, _ = jax.lax.while_loop(
        lambda carry: (carry[0].step < T) & ~jnp.all(carry[0].done),
        advance,
        (choose(start.logits, row), make_cache(start, T - 1)),
    )
    scores = row.log_p / length_divisor(row.lengths, settings)
    return Generated(row.ids, row.lengths, scores, row.logits)
