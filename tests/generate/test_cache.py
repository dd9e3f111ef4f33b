"""Decoding over a cache is the plain forward pass, whatever the padding and the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.generate.decode import decode
from internvl_jax.generate.prompt import caption, caption_start, chat, chat_start, left_pad
from internvl_jax.generate.settings import Settings
from internvl_jax.models.internvl import InternVL
from internvl_jax.models.internvl_chat import InternVLChat
from internvl_jax.models.qllama import causal_mask, positions_of, query_text_mask
from internvl_jax.nn.param import axes_of
from internvl_jax.sharding.mesh import MeshConfig, make_mesh
from internvl_jax.sharding.rules import parameter_sharding

ROWS = [[1, 5, 9, 12], [1, 7], [1, 3, 20]]
T = 6
ENDLESS = Settings(max_new_tokens=T, min_new_tokens=T)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(*shape, 28, 28, 3)).astype(np.float32)


def test_cached_logits_equal_uncached_caption(captioner: InternVL):
    ids, mask = left_pad(ROWS)
    pixels = images(3)
    out = decode(
        captioner.qllama, caption_start(captioner, pixels, ids, mask), ENDLESS, logits=True
    )

    @jax.jit
    def uncached(ids, mask):
        queries = captioner.query_inputs(3)
        x = jnp.concatenate([queries, captioner.qllama.embed(ids)], axis=1)
        whole = jnp.concatenate([jnp.ones((3, 3), bool), mask], axis=1)
        vision = captioner.image_tokens(jnp.asarray(pixels))
        attention = query_text_mask(3, mask, "itg")
        return captioner.qllama.logits(
            captioner.qllama(x, positions_of(whole), attention, vision=vision, queries=3).hidden
        )

    row = np.concatenate([ids, np.asarray(out.ids)[:, :-1]], axis=1)
    logits = uncached(row, np.pad(mask, [(0, 0), (0, T - 1)], constant_values=True))[:, -T:]
    assert np.all(np.asarray(out.logits[..., 2])[:T] == -np.inf)
    cached = np.asarray(jnp.swapaxes(out.logits, 0, 1)).copy()
    cached[..., 2] = logits[..., 2]
    np.testing.assert_allclose(cached, logits, atol=1e-5 * np.abs(logits).max())


def test_cached_logits_equal_uncached_chat(chatter: InternVLChat):
    rows = [[1, IMAGE_TOKEN, 8, IMAGE_TOKEN, 4], [1, IMAGE_TOKEN, 6]]
    ids, mask = left_pad(rows)
    pixels = images(2, 2)
    out = decode(chatter.llm, chat_start(chatter, pixels, ids, mask), ENDLESS, logits=True)

    @jax.jit
    def uncached(ids, mask):
        visual = chatter.visual_embeddings(jnp.asarray(pixels.reshape(4, 28, 28, 3)))
        x = chatter.splice(ids, visual.reshape(2, 2, -1))
        return chatter.llm.logits(chatter.llm(x, positions_of(mask), causal_mask(mask)).hidden)

    row = np.concatenate([ids, np.asarray(out.ids)[:, :-1]], axis=1)
    logits = uncached(row, np.pad(mask, [(0, 0), (0, T - 1)], constant_values=True))[:, -T:]
    cached = np.asarray(jnp.swapaxes(out.logits, 0, 1)).copy()
    cached[..., 2] = logits[..., 2]
    np.testing.assert_allclose(cached, logits, atol=1e-5 * np.abs(logits).max())


def test_left_padded_batch_equals_one_by_one(captioner: InternVL):
    ids, mask = left_pad(ROWS[:2], pad_id=27)
    pixels = images(2)
    settings = Settings(max_new_tokens=T, num_beams=3, pad_id=27)
    together = decode(captioner.qllama, caption_start(captioner, pixels, ids, mask), settings)
    one, here = left_pad(ROWS[1:2])
    alone = decode(captioner.qllama, caption_start(captioner, pixels[1:], one, here), settings)
    np.testing.assert_array_equal(alone.ids[0], together.ids[1])
    np.testing.assert_allclose(alone.scores[0], together.scores[1], rtol=1e-5)
    assert not np.array_equal(together.ids[0], together.ids[1])


def test_front_door(captioner: InternVL, chatter: InternVLChat):
    """uint8 pictures are normalised, a seed stands in front, a chat needs no picture."""
    ids, mask = left_pad(ROWS)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = ((pixels / 255.0 - mean) / std).astype(np.float32)
    got = caption(captioner, pixels, ids, mask, ENDLESS)
    np.testing.assert_array_equal(got, caption(captioner, normal, ids, mask, ENDLESS))
    assert got.shape == (3, T)

    seeded = Settings(max_new_tokens=T, min_new_tokens=T, bos_id=1)
    answer = chat(chatter, None, ids, mask, seeded)
    assert answer.shape == (3, 1 + T) and np.all(np.asarray(answer)[:, 0] == 1)
    spaces = np.zeros((3, 1, 28, 28, 3), np.float32)  # an image that no token asks for
    np.testing.assert_array_equal(answer, chat(chatter, spaces, ids, mask, seeded))


@pytest.mark.slow
def test_a_mesh_finds_the_same(captioner: InternVL):
    """Parameters split over fsdp and tensor, rows over fsdp."""
    ids, mask = left_pad([*ROWS, [1, 4]])
    pixels, settings = images(4), Settings(max_new_tokens=T, num_beams=3)
    alone = caption(captioner, pixels, ids, mask, settings)
    mesh = make_mesh(MeshConfig(replica=1, fsdp=2, tensor=2), jax.devices()[:4])
    graphdef, state = nnx.split(captioner)

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        sharding = parameter_sharding("", value.shape, axes_of(variable), mesh)
        return variable.replace(jax.device_put(value, sharding))

    state = jax.tree.map(place, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    with jax.set_mesh(mesh):
        got = caption(nnx.merge(graphdef, state), pixels, ids, mask, settings)
    assert len(got.sharding.device_set) == 4
    np.testing.assert_array_equal(got, alone)


def test_left_pad():
    ids, mask = left_pad([[1, 2, 3], [4]], pad_id=7, multiple=4)
    np.testing.assert_array_equal(ids, [[7, 1, 2, 3], [7, 7, 7, 4]])
    np.testing.assert_array_equal(mask, [[False, True, True, True], [False, False, False, True]])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        left_pad([[1], []])


@pytest.mark.parametrize("row", [[True, True, False], [True, False, True], [False, False, False]])
def test_other_padding_is_refused(captioner: InternVL, row: list[bool]):
    mask = np.array([[True, True, True], row])
    with pytest.raises(ValueError, match="Prompt 1 is empty or not left-padded"):
        caption(captioner, images(2), np.ones((2, 3), np.int32), mask, ENDLESS)


def test_what_does_not_fit_is_refused(captioner: InternVL, chatter: InternVLChat):
    ids, mask = left_pad([[1, 4], [1, IMAGE_TOKEN]])
    with pytest.raises(ValueError, match="Prompt 1 has 1 image tokens for 0 image"):
        chat(chatter, None, ids, mask, ENDLESS)
    with pytest.raises(ValueError, match=r"1 image tokens for 1 image\(s\) of 4"):
        chat(chatter, np.zeros((2, 1, 56, 56, 3), np.uint8), ids, mask, ENDLESS)
    ids[0, 1] = 29
    with pytest.raises(ValueError, match="hold the id 29, but the model embeds 29"):
        caption(captioner, images(2), np.abs(ids), mask, ENDLESS)
