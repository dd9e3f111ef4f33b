"""From images and token ids to new token ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int, Key, Shaped

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.generate.cache import Start, started
from internvl_jax.generate.decode import decode
from internvl_jax.generate.settings import Settings
from internvl_jax.models.intern_vit import normalize_images
from internvl_jax.models.internvl import InternVL
from internvl_jax.models.internvl_chat import InternVLChat
from internvl_jax.models.qllama import causal_mask, positions_of, query_text_mask

Given = jax.Array | np.ndarray


def left_pad(
    rows: Sequence[Sequence[int] | np.ndarray], pad_id: int = 0, *, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one batch that ends together.

    Args:
        rows: B prompts, without padding.
        pad_id: fills the front.
        multiple: the width is rounded up to a multiple of it, so that fewer widths (and programs)
            occur.

    Returns:
        ids int32 [B, T] and mask bool [B, T].

    Raises:
        ValueError: on an empty prompt, which has nothing to continue.
    """
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"Prompt {i} is empty: give at least BOS.")
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return ids, mask


def caption(
    model: InternVL,
    images: Shaped[Given, "B S S 3"],
    prompt_ids: Int[Given, "B T"],
    prompt_mask: Bool[Given, "B T"],
    settings: Settings,
    key: Key[jax.Array, ""] | None = None,
) -> Int[jax.Array, "B new"]:
    """Captions images with QLLaMA.

    Args:
        model: with queries (InternVL-G).
        images: [B, S, S, 3], uint8, or float and already normalised.
        prompt_ids: int [B, T] with BOS and without EOS, e.g. of "English caption:"; left-padded.
        prompt_mask: bool [B, T].
        settings: how to search.
        key: for sampling.

    Returns:
        int32 [B, max_new_tokens] (see `Settings.bos_id`), padded after EOS.

    Raises:
        ValueError: if a prompt is not left-padded or empty, or holds an unknown id.
    """
    check(prompt_ids, prompt_mask, model.cfg.qllama.vocab_size)
    start = caption_start(model, images, prompt_ids, prompt_mask)
    return decode(model.qllama, start, settings, key).ids


def chat(
    model: InternVLChat,
    images: Shaped[Given, "B M S S 3"] | None,
    text: Int[Given, "B T"],
    text_mask: Bool[Given, "B T"],
    settings: Settings,
    key: Key[jax.Array, ""] | None = None,
) -> Int[jax.Array, "B new"]:
    """Answers prompts with a chat model.

    Args:
        model: the chat model.
        images: [B, M, S, S, 3], uint8, or float and already normalised; None without pictures.
        text: int [B, T], V `batch.IMAGE_TOKEN`s per image; left-padded.
        text_mask: bool [B, T].
        settings: how to search.
        key: for sampling.

    Returns:
        int32 [B, max_new_tokens] (see `Settings.bos_id`), padded after EOS.

    Raises:
        ValueError: if a prompt is not left-padded or empty, holds an unknown id, or asks for other
            images than are given.
    """
    check(text, text_mask, model.cfg.llm.vocab_size)
    count, size = (0, 0) if images is None else (images.shape[1], images.shape[2])
    check_images(text, count, model.cfg.visual_tokens(size))
    return decode(model.llm, chat_start(model, images, text, text_mask), settings, key).ids


def caption_start(
    model: InternVL,
    images: Shaped[Given, "B S S 3"],
    ids: Int[Given, "B T"],
    mask: Bool[Given, "B T"],
) -> Start:
    """Reads [queries][text], the queries looking at the image; arguments as in `caption`."""
    return _caption_start(*nnx.split(model), images, ids, mask)


def chat_start(
    model: InternVLChat,
    images: Shaped[Given, "B M S S 3"] | None,
    text: Int[Given, "B T"],
    mask: Bool[Given, "B T"],
) -> Start:
    """Reads text with visual tokens spliced in; arguments as in `chat`."""
    return _chat_start(*nnx.split(model), images, text, mask)


def check(ids: Int[Given, "B T"], mask: Bool[Given, "B T"], vocabulary: int) -> None:
    """Refuses prompts that cannot be continued.

    Args:
        ids: tokens and, in a chat, `IMAGE_TOKEN`s.
        mask: True at tokens.
        vocabulary: rows of the embedding.

    Raises:
        ValueError: if a row is not left-padded or empty, or an id has no embedding.
    """
    ids, mask = np.asarray(ids), np.asarray(mask).astype(bool)
    wrong = np.flatnonzero(~mask[:, -1] | np.any(mask[:, :-1] & ~mask[:, 1:], axis=1))
    if wrong.size:
        raise ValueError(
            f"Prompt {wrong[0]} is empty or not left-padded: new tokens are appended at the end of "
            "its row, so padding must stand in front (`left_pad`)."
        )
    strange = ids[((ids < 0) | (ids >= vocabulary)) & (ids != IMAGE_TOKEN)]
    if strange.size:
        raise ValueError(
            f"The prompts hold the id {strange[0]}, but the model embeds {vocabulary}: use its own "
            "tokenizer."
        )


def check_images(text: Int[Given, "B T"], images: int, visual_tokens: int) -> None:
    """Raises ValueError unless each row [B, T] asks for whole images, and for at most `images`."""
    wanted = np.sum(np.asarray(text) == IMAGE_TOKEN, axis=1)
    most = images * visual_tokens
    wrong = np.flatnonzero((wanted > most) | (wanted % max(visual_tokens, 1) != 0))
    if wrong.size:
        raise ValueError(
            f"Prompt {wrong[0]} has {wanted[wrong[0]]} image tokens for {images} image(s) of "
            f"{visual_tokens}: expand every image placeholder to {visual_tokens}."
        )


@functools.partial(jax.jit, static_argnums=0)
def _caption_start(
    graphdef: Any, state: Any, images: jax.Array, ids: jax.Array, mask: jax.Array
) -> Start:
    model = nnx.merge(graphdef, state)
    queries = model.query_inputs(ids.shape[0])
    Q = queries.shape[1]
    x = jnp.concatenate([queries, model.qllama.embed(ids)], axis=1)  # [B, Q + T, D]
    whole = jnp.pad(mask.astype(bool), [(0, 0), (Q, 0)], constant_values=True)
    attention = query_text_mask(Q, mask, "itg")
    vision = model.image_tokens(_normalized(images))
    out = model.qllama(x, positions_of(whole), attention, vision=vision, queries=Q)
    return started(model.qllama, out, whole)


@functools.partial(jax.jit, static_argnums=0)
def _chat_start(
    graphdef: Any, state: Any, images: jax.Array | None, text: jax.Array, mask: jax.Array
) -> Start:
    model = nnx.merge(graphdef, state)
    if images is None:
        x = model.llm.embed(text)
    else:
        B, M = images.shape[:2]
        visual = model.visual_embeddings(_normalized(images).reshape(B * M, *images.shape[2:]))
        x = model.splice(text, visual.reshape(B, M * visual.shape[1], visual.shape[2]))
    out = model.llm(x, positions_of(mask), causal_mask(mask))
    return started(model.llm, out, mask)


def _normalized(images: jax.Array) -> jax.Array:
    return normalize_images(images) if images.dtype == jnp.uint8 else images
