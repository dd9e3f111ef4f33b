"""Keys and values of the tokens so far, and the two ways a decoder is run on them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from internvl_jax.models.llama import Llama, LlamaOutput
from internvl_jax.nn.attention import KeyValue
from internvl_jax.sharding.rules import constrain


class Start(NamedTuple):
    """A prompt the decoder has read.

    Attributes:
        logits: float32 [B, V] for the first new token.
        kv: keys and values [L, B, T, K, H] of the prompt.
        mask: bool [B, T], False on (left) padding.
    """

    logits: jax.Array
    kv: KeyValue
    mask: jax.Array


class Cache(NamedTuple):
    """A cache of fixed capacity S; all rows fill the same slot at the same time.

    The layers only read it: a step's new keys and values leave the layer scan as outputs and are
    written once, after it. Carrying the cache through the scan instead copies all of it per layer.

    Attributes:
        kv: [L, R, S, K, H] each.
        mask: bool [R, S], True where a slot holds a token.
        position: int32 [R], position of each row's next token. Left-padded rows have their own.
        filled: int32, how many slots are taken.
    """

    kv: KeyValue
    mask: jax.Array
    position: jax.Array
    filled: jax.Array

    def take(self, rows: Int[Array, "rows"]) -> Cache:
        """The cache of other rows: int [R'] -> R' rows."""
        kv = jax.tree.map(lambda a: _placed(jnp.take(a, rows, axis=1)), self.kv)
        return Cache(kv, self.mask[rows], self.position[rows], self.filled)


def make_cache(start: Start, room: int, copies: int = 1) -> Cache:
    """A cache that holds a prompt and has room for more.

    Args:
        start: the prompt.
        room: tokens that will be appended.
        copies: rows per prompt (beams), consecutive.
    """

    def pad(a: jax.Array) -> jax.Array:
        a = jnp.repeat(a, copies, axis=1)
        return _placed(jnp.pad(a, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]))

    mask = jnp.repeat(start.mask, copies, axis=0)
    position = jnp.sum(mask, axis=1, dtype=jnp.int32)
    filled = jnp.asarray(mask.shape[1], jnp.int32)
    return Cache(jax.tree.map(pad, start.kv), jnp.pad(mask, [(0, 0), (0, room)]), position, filled)


def started(llm: Llama, out: LlamaOutput, mask: Bool[Array, "B T"]) -> Start:
    """What `Cache` and the first choice need of a prefill pass; bool mask [B, T]."""
    return Start(llm.logits(out.hidden[:, -1]), out.kv, mask)


def step(llm: Llama, ids: Int[Array, "R"], cache: Cache) -> tuple[Float[Array, "R V"], Cache]:
    """Feeds one token per row.

    Args:
        llm: the decoder. QLLaMA's steps have no cross-attention: queries are part of the prompt.
        ids: int [R].
        cache: the tokens before.

    Returns:
        float32 logits [R, V] for the next token and the cache with this one.
    """
    rows = ids.shape[0]
    attention = jnp.concatenate([cache.mask, jnp.ones((rows, 1), bool)], axis=1)[:, None]
    out = llm(llm.embed(ids[:, None]), cache.position[:, None], attention, cache=cache.kv)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        at = (0, 0, cache.filled, 0, 0)
        return _placed(jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at))

    mask = jax.lax.dynamic_update_slice(cache.mask, jnp.ones((rows, 1), bool), (0, cache.filled))
    kv = jax.tree.map(write, cache.kv, out.kv)
    return llm.logits(out.hidden[:, 0]), Cache(kv, mask, cache.position + 1, cache.filled + 1)


def _placed(a: jax.Array) -> jax.Array:
    return constrain(a, None, "batch", None, "kv_heads", None)
