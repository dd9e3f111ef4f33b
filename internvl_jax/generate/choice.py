"""What may be chosen next, and what a row scores: shared by all searches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from internvl_jax.generate.settings import Settings

STATIC = ("max_new_tokens", "num_beams", "early_stopping", "do_sample")
"""Settings that shape a program; the others are traced, so that changing them compiles nothing."""

_TRACED = tuple(f.name for f in dataclasses.fields(Settings) if f.name not in STATIC)


def _flatten(settings: Settings) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(settings, n) for n in _TRACED), tuple(getattr(settings, n) for n in STATIC)


def _unflatten(static: tuple[Any, ...], traced: tuple[Any, ...]) -> Settings:
    settings = object.__new__(Settings)  # tracers cannot be validated again
    vars(settings).update(zip(_TRACED + STATIC, (*traced, *static), strict=True))
    return settings


jax.tree_util.register_pytree_node(Settings, _flatten, _unflatten)


def forbid_eos(
    scores: Float[Array, "*rows V"], chosen: jax.Array, settings: Settings
) -> Float[Array, "*rows V"]:
    """EOS at -inf while fewer than `min_new_tokens` have been chosen; [..., V] -> [..., V]."""
    eos = jnp.arange(scores.shape[-1]) == settings.eos_id
    return jnp.where(eos & (chosen < settings.min_new_tokens), -jnp.inf, scores)


def length_divisor(tokens: ArrayLike, settings: Settings) -> jax.Array:
    """length ** length_penalty, float32."""
    return jnp.asarray(tokens, jnp.float32) ** settings.length_penalty


def filter_logits(
    logits: Float[Array, "B V"], temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike
) -> Float[Array, "B V"]:
    """Logits to sample from: temperature, then top-k, then top-p among what top-k left.

    Args:
        logits: float32 [B, V].
        temperature, top_k, top_p: scalars, see `Settings`. Ties with the last kept token are kept.

    Returns:
        float32 [B, V], -inf where a token must not be drawn.
    """
    V = logits.shape[-1]
    logits = logits / temperature
    ranked = jnp.sort(logits, axis=-1, descending=True)
    top_k = jnp.asarray(top_k)
    last = jnp.where((top_k > 0) & (top_k < V), top_k, V) - 1
    ranked = jnp.where(ranked < jnp.take(ranked, last, axis=-1)[:, None], -jnp.inf, ranked)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept = (ranked > -jnp.inf) & ((before < top_p) | (jnp.asarray(top_p) >= 1))
    floor = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < floor, -jnp.inf, logits)
