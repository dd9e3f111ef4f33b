"""Images and texts to unit vectors: one jitted function each, fed in padded batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from internvl_jax.models.intern_vit import normalize_images
from internvl_jax.models.internvl import InternVL, unit
from internvl_jax.sharding.rules import constrain


def in_batches(
    function: Callable[..., Any], arrays: tuple[np.ndarray, ...], batch_size: int
) -> np.ndarray:
    """Calls a function on batches of one size, so that it compiles once whatever N is.

    Args:
        function: arrays with ``batch_size`` rows -> an array with as many.
        arrays: of N rows each, N at least 1.
        batch_size: rows per call; the last batch repeats its last row, and what that gives is cut
            off again.

    Returns:
        [N, ...].
    """
    out = []
    for start in range(0, len(arrays[0]), batch_size):
        rows = [array[start : start + batch_size] for array in arrays]
        real = len(rows[0])
        fill = batch_size - real
        full = [np.concatenate([r, np.repeat(r[-1:], fill, axis=0)]) if fill else r for r in rows]
        out.append(np.asarray(function(*full))[:real])
    return np.concatenate(out)


def embed_images(
    model: InternVL, images: np.ndarray, mode: str, *, batch_size: int = 64
) -> np.ndarray:
    """Features of pictures.

    Args:
        model: its `image_embedding` is used.
        images: [N, S, S, 3] uint8.
        mode: "C", or "G" for a model with queries.
        batch_size: rows per call.

    Returns:
        float32 [N, E] of length one.
    """
    graphdef, state = nnx.split(model)
    function = functools.partial(_embed_images, graphdef, mode, state)
    return in_batches(function, (images,), batch_size)


def embed_texts(
    model: InternVL, text: np.ndarray, text_mask: np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """Features of texts, which C and G share.

    Args:
        model: its `text_embedding` is used.
        text: int32 [N, T], right-padded, BOS to EOS, prefixed with `batch.SUMMARIZE`.
        text_mask: bool [N, T].
        batch_size: rows per call.

    Returns:
        float32 [N, E] of length one.
    """
    graphdef, state = nnx.split(model)
    function = functools.partial(_embed_texts, graphdef, state)
    return in_batches(function, (text, text_mask), batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_images(graphdef: Any, mode: str, state: Any, images: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    images = constrain(normalize_images(images), "batch", None, None, None)
    return constrain(unit(model.image_embedding(model.image_tokens(images), mode)), None, None)


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(graphdef: Any, state: Any, text: jax.Array, text_mask: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    text, text_mask = constrain(text, "batch", None), constrain(text_mask, "batch", None)
    return constrain(unit(model.text_embedding(text, text_mask)), None, None)
