"""The dialogue model: which features, through which projector, into which positions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.models.llama import LlamaConfig

EXACT = Compute(dtype="float32", remat="none")
VIT = VitConfig(image_size=32, patch_size=8, width=12, depth=3, heads=2, mlp_dim=16)
LLM = LlamaConfig(vocab_size=20, width=16, depth=1, heads=4, kv_heads=2, mlp_dim=24)
QLLAMA = LlamaConfig(
    vocab_size=20, width=8, depth=2, heads=2, mlp_dim=12, cross_frequency=2, vision_width=12
)
GLUE = {
    "mlp2x_gelu": dict(projector="mlp2x_gelu", select_layer=-2),
    "mlp1": dict(projector="mlp1", unshuffle="v1"),
    "two_mlp": dict(projector="mlp2x_gelu", qllama=QLLAMA, queries=3, select_layer=-3),
    "mlp1 and queries": dict(projector="mlp1", qllama=QLLAMA, queries=3),
    "queries": dict(projector="none", qllama=QLLAMA, queries=3),
}
TOKENS = {"mlp2x_gelu": 16, "mlp1": 4, "two_mlp": 19, "mlp1 and queries": 7, "queries": 3}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)


def make(drawn, glue):
    cfg = ChatConfig(vision=VIT, llm=LLM, **GLUE[glue])
    return drawn(lambda rngs: InternVLChat(cfg, EXACT, rngs=rngs))


@pytest.mark.parametrize("glue", GLUE)
def test_visual_tokens_of_every_glue(drawn, glue):
    """Queries first, read from the last layer; then the patches of the selected one, no CLS."""
    model = make(drawn, glue)
    assert model.cfg.visual_tokens(32) == TOKENS[glue]
    visual = model.visual_embeddings(IMAGES)
    assert visual.shape == (2, TOKENS[glue], 16)

    hidden = model.vision(IMAGES, hidden=True)
    parts = []
    if model.qllama is not None:
        x = jnp.broadcast_to(model.query_tokens[...], (2, 3, 8))
        positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
        full = jnp.ones((1, 3, 3), bool)
        read = model.qllama(x, positions, full, vision=hidden.tokens, queries=3).hidden
        parts.append(model.query_projector(read))
    if model.projector is not None:
        # -1 is the last block's output, -2 the one before the last block but one: as the original
        # counts, hidden state 0 is the embedding.
        layer = {-1: 2, -2: 1, -3: 0}[model.cfg.select_layer]
        parts.append(model.projector(hidden.hidden[layer][:, 1:]))
    np.testing.assert_allclose(visual, jnp.concatenate(parts, 1), atol=1e-4)


V = 2  # visual tokens per image in the tests below


@pytest.fixture(scope="module")
def model(drawn):
    return make(drawn, "mlp1")


def test_splice_puts_each_image_where_it_is_asked_for(model):
    """Row 0 shows two images, row 1 one of its two slots, row 2 none."""
    I = IMAGE_TOKEN
    text = jnp.asarray(
        [[1, I, I, 5, I, I, 2, 0], [1, 7, I, I, 3, 2, 0, 0], [1, 4, 6, 2, 0, 0, 0, 0]]
    )
    visual = 100.0 + jnp.arange(3 * 2 * V * 16, dtype=jnp.float32).reshape(3, 2 * V, 16)
    x = np.asarray(model.splice(text, visual))
    words = np.asarray(model.llm.embedding[...])
    for b in range(3):
        taken = 0
        for t in range(8):
            if int(text[b, t]) == I:
                np.testing.assert_array_equal(x[b, t], visual[b, taken])
                taken += 1
            else:
                np.testing.assert_array_equal(x[b, t], words[int(text[b, t])])
        assert taken == [4, 2, 0][b]


def test_an_empty_slot_has_no_influence(model):
    I = IMAGE_TOKEN
    text = jnp.asarray([[1, I, I, I, I, 5, 2, 0]])
    segment = (text != 0).astype(jnp.int32)
    images = jnp.stack([IMAGES[0], jnp.zeros_like(IMAGES[0])])[None]
    other = jnp.stack([IMAGES[0], IMAGES[1]])[None]
    a, b = (model.hidden(i, text, segment) for i in (images, other))
    np.testing.assert_array_equal(a, b)
    c = model.hidden(other[:, ::-1], text, segment)
    assert float(jnp.abs(c - a).max()) > 1e-3


def test_conversations_packed_in_a_row_do_not_see_each_other(model):
    I = IMAGE_TOKEN
    rows = jnp.asarray([[1, I, I, I, I, 5, 2], [1, I, I, I, I, 7, 2], [1, 4, 6, 3, 2, 0, 0]])
    images = jnp.stack([IMAGES[:1], IMAGES[1:2], jnp.zeros_like(IMAGES[:1])])
    alone = model.hidden(images, rows, (rows != 0).astype(jnp.int32))
    text = jnp.concatenate([rows[0], rows[1], rows[2, :5], jnp.zeros(2, jnp.int32)])[None]
    segment = jnp.asarray([[1] * 7 + [2] * 7 + [3] * 5 + [0] * 2])
    packed = model.hidden(IMAGES[None], text, segment)[0]
    for start, length, expected in ((0, 7, alone[0]), (7, 7, alone[1]), (14, 5, alone[2])):
        np.testing.assert_allclose(
            packed[start : start + length], expected[:length], rtol=0, atol=1e-5
        )


def test_two_images_equal_their_embeddings_in_order(model):
    I = IMAGE_TOKEN
    text = jnp.asarray([[1, I, I, I, I, 5, I, I, I, I, 2]])
    hidden = model.hidden(IMAGES[None], text, jnp.ones_like(text))
    visual = model.visual_embeddings(IMAGES)
    words = model.llm.embed(jnp.asarray([[1, 5, 2]]))
    x = jnp.concatenate([words[:, :1], visual[:1], words[:, 1:2], visual[1:], words[:, 2:]], axis=1)
    positions = jnp.arange(11)[None]
    expected = model.llm(x, positions, jnp.tril(jnp.ones((1, 11, 11), bool))).hidden
    np.testing.assert_allclose(hidden, expected, atol=1e-4)


def test_selected_layer_counts_as_the_original():
    """hidden_states[-4] of 48 layers is the output of the 0-based block 44."""
    assert dataclasses.replace(ChatConfig(), select_layer=-4).select_layer % 48 == 44
