"""QLLaMA's masks against the table, and what each of them lets through the whole model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVL, InternVLConfig, unit
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.models.qllama import causal_mask, positions_of, query_text_mask

EXACT = Compute(dtype="float32", remat="none")
Q, T = 3, 4
TEXT_MASK = jnp.asarray([[True, True, True, False], [True, True, True, True]])
BLOCKS = {  # Q->Q, Q->T, T->Q, T->T
    "itc": ("full", "no", "no", "causal"),
    "itm": ("full", "full", "full", "full"),
    "itg": ("full", "no", "full", "causal"),
}


def block(kind: str, rows: int, columns: int) -> np.ndarray:
    whole = np.ones((rows, columns), bool)
    return {"full": whole, "no": ~whole, "causal": np.tril(whole)}[kind]


@pytest.mark.parametrize("use", BLOCKS)
def test_masks_are_the_table(use):
    qq, qt, tq, tt = (
        block(k, *s) for k, s in zip(BLOCKS[use], ((Q, Q), (Q, T), (T, Q), (T, T)), strict=True)
    )
    expected = np.block([[qq, qt], [tq, tt]])[None].repeat(2, 0)
    expected[0, :, Q + 3] = False  # the padding column of the first row
    np.testing.assert_array_equal(query_text_mask(Q, TEXT_MASK, use), expected)


def test_text_alone_is_causal():
    expected = np.tril(np.ones((2, T, T), bool))
    expected[0, :, 3] = False
    np.testing.assert_array_equal(causal_mask(TEXT_MASK).dense(T, T), expected)


def test_positions_skip_padding_on_either_side():
    mask = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(positions_of(mask), [[1, 1, 0, 1, 2], [0, 1, 2, 1, 1]])


@pytest.fixture(scope="module")
def model(drawn):
    vision = VitConfig(image_size=16, patch_size=8, width=12, depth=1, heads=2, mlp_dim=16)
    qllama = LlamaConfig(
        vocab_size=20,
        width=16,
        depth=3,
        heads=4,
        mlp_dim=24,
        cross_frequency=2,
        vision_width=12,
        pad_id=0,
    )
    cfg = InternVLConfig(vision=vision, qllama=qllama, queries=Q, embed_dim=6, pool_heads=2)
    return drawn(lambda rngs: InternVL(cfg, EXACT, rngs=rngs))


@pytest.fixture(scope="module")
def fused(model):
    """One compiled pass over [queries][text]: vision, ids, mask -> hidden states."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *x: nnx.merge(graphdef, state).fused(*x).hidden)
    return functools.partial(run, state)


@pytest.fixture(scope="module")
def vision(model):
    return model.image_tokens(IMAGES)


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
TEXT = jnp.asarray([[1, 7, 2, 0], [1, 9, 11, 2]])


@pytest.mark.parametrize("use", BLOCKS)
def test_what_reads_what(vision, fused, use):
    """Change the text's last token: queries notice in ITM, earlier tokens never in ITC and ITG."""
    mask = query_text_mask(Q, jnp.ones((2, T), bool), use)
    before = fused(vision, TEXT, mask)
    after = fused(vision, TEXT.at[:, -1].set(5), mask)
    other = fused(vision + 1.0, TEXT, mask)

    def moved(x, rows) -> bool:
        return float(jnp.abs(x - before)[:, rows].max()) > 1e-3

    assert moved(after, slice(0, Q)) == (use == "itm")
    assert moved(after, slice(Q, -1)) == (use == "itm")
    assert moved(after, slice(Q + T - 1, None))
    assert moved(other, slice(0, Q))
    assert moved(other, slice(Q, None)) == (use != "itc")


def test_itc_rows_equal_the_two_encoders(model, vision, fused):
    """Isolated in one row, queries and text are what they are alone (RoPE is relative)."""
    mask = TEXT > 0
    hidden = fused(vision, TEXT, query_text_mask(Q, mask, "itc"))
    np.testing.assert_allclose(hidden[:, :Q], model.query_states(vision), atol=1e-5)
    text = model.project_text(hidden[:, Q:], mask)
    np.testing.assert_allclose(text, model.text_embedding(TEXT, mask), atol=1e-5)


def test_rows_of_one_image_are_consecutive(vision, fused):
    mask = query_text_mask(Q, TEXT > 0, "itm")
    rows = jnp.repeat(TEXT, 2, 0), jnp.repeat(mask, 2, 0)
    both = fused(vision, *rows)
    one = fused(vision, TEXT, mask)
    np.testing.assert_allclose(both, jnp.repeat(one, 2, 0), atol=1e-5)


def test_g_adds_two_unit_vectors(model, vision):
    c, g = model.image_embedding(vision, "C"), model.image_embedding(vision, "G")
    queries = model.clip_projector2(model.query_states(vision))
    np.testing.assert_allclose(g, unit(c) + unit(queries), atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(unit(c), axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="Unknown mode 'H'"):
        model.image_embedding(vision, "H")


def test_similarity_of_the_whole_model(model):
    mask = TEXT > 0
    logits = model(IMAGES, TEXT, mask, "C")
    image = unit(model.image_embedding(model.image_tokens(IMAGES), "C"))
    expected = jnp.exp(model.logit_scale[...]) * image @ unit(model.text_embedding(TEXT, mask)).T
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_matching_averages_logits_over_queries(model, vision, fused):
    mask = TEXT > 0
    hidden = fused(vision, TEXT, query_text_mask(Q, mask, "itm"))[:, :Q]
    each = jnp.einsum("BQD,DC->BQC", hidden, model.itm_head[...]) + model.itm_bias[...]
    np.testing.assert_allclose(model.matching_score(vision, TEXT, mask), each.mean(1), atol=1e-5)


def test_the_text_vector_is_the_end_token(model):
    """Whatever stands after the end does not count; the end itself does."""
    mask = TEXT > 0
    vector = model.text_embedding(TEXT, mask)
    np.testing.assert_allclose(model.text_embedding(TEXT.at[0, 3].set(8), mask), vector, atol=1e-6)
    changed = model.text_embedding(TEXT.at[0, 2].set(8), mask)
    assert float(jnp.abs(changed - vector)[0].max()) > 1e-3


def test_a_model_without_queries_says_so(drawn):
    vision = VitConfig(image_size=16, patch_size=8, width=12, depth=1, heads=2, mlp_dim=16)
    qllama = LlamaConfig(vocab_size=20, width=16, depth=1, heads=4, mlp_dim=24)
    cfg = InternVLConfig(vision=vision, qllama=qllama, queries=0, embed_dim=6, pool_heads=2)
    model = drawn(lambda rngs: InternVL(cfg, EXACT, rngs=rngs))
    with pytest.raises(ValueError, match="no queries"):
        model.query_states(jnp.zeros((1, 5, 12)))
