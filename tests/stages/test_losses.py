"""What each stage's loss is made of; its numbers are compared with the original's in parity/."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.models.intern_vit import normalize_images
from internvl_jax.models.internvl import unit
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.models.qllama import causal_mask, query_text_mask
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.language import LanguageStage

KEY = jax.random.key(0)
B = 6


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of every row."""
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    return total - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def contrastive(parts):
    return ContrastiveStage(
        model=parts["contrastive"], compute=parts["compute"], image_size=16, text_length=6, chunk=4
    )


def test_contrastive_loss_is_clips(contrastive, model_of, batch_of):
    model, batch = model_of(contrastive), batch_of(contrastive, B)
    loss, metrics = contrastive.loss(model, batch, None)
    image = unit(model.image_embedding(model.image_tokens(normalize_images(batch["image"])), "C"))
    text = unit(model.text_embedding(batch["text"], batch["text_mask"]))
    logits = np.exp(float(model.logit_scale[...])) * np.asarray(image) @ np.asarray(text).T
    rows = np.arange(B)
    expected = (cross_entropy(logits, rows).mean() + cross_entropy(logits.T, rows).mean()) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["i2t_accuracy"]) == pytest.approx((logits.argmax(1) == rows).mean())
    assert float(metrics["logit_scale"]) == pytest.approx(np.exp(float(model.logit_scale[...])))


def test_masks_and_drop_path_belong_to_training(contrastive, model_of, batch_of):
    model, batch = model_of(contrastive), batch_of(contrastive, B)
    half = dataclasses.replace(contrastive, keep=0.5)
    quiet = contrastive.embed(model, batch, None)
    np.testing.assert_array_equal(half.embed(model, batch, None)["image"], quiet["image"])
    dropped = contrastive.embed(model, batch, KEY)
    masked = half.embed(model, batch, KEY)
    again = half.embed(model, batch, KEY)
    np.testing.assert_array_equal(masked["image"], again["image"])
    assert not np.allclose(dropped["image"], quiet["image"])
    assert not np.allclose(masked["image"], dropped["image"])
    np.testing.assert_array_equal(masked["text"], quiet["text"])


def test_sigmoid_loss_asks_every_pair(contrastive, parts, model_of, batch_of):
    biased = dataclasses.replace(parts["contrastive"], logit_bias=-2.0)
    stage = dataclasses.replace(contrastive, model=biased, objective="sigmoid")
    model, batch = model_of(stage), batch_of(stage, B)
    found = stage.embed(model, batch, None)
    image, text = (np.asarray(unit(found[k])) for k in ("image", "text"))
    logits = np.exp(float(model.logit_scale[...])) * image @ text.T + float(model.logit_bias[...])
    sign = 2 * np.eye(B) - 1
    expected = np.log1p(np.exp(-sign * logits)).sum(1).mean()
    assert float(stage.loss(model, batch, None)[0]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def generative(parts):
    return GenerativeStage(
        model=parts["generative"], compute=parts["compute"], image_size=16, text_length=6, chunk=4
    )


def test_pretraining_adds_three_losses(generative, model_of, batch_of):
    """ITM on half wrong, half right captions; ITC on summaries; ITG on prompted captions."""
    model, batch = model_of(generative), batch_of(generative, B)
    loss, metrics = generative.loss(model, batch, None)
    vision, Q = model.image_tokens(normalize_images(batch["image"])), 3

    wrong, right = B - B // 2, B // 2
    scores = [
        model.matching_score(vision, batch[k], batch[f"{k}_mask"]) for k in ("negative", "positive")
    ]
    logits = np.concatenate([scores[0][:wrong], scores[1][wrong:]])
    itm = cross_entropy(logits, np.array([0] * wrong + [1] * right)).mean()
    assert float(metrics["loss_itm"]) == pytest.approx(itm, rel=1e-4)

    image = unit(model.clip_projector2(model.query_states(vision)))
    text = unit(model.text_embedding(batch["summarize"], batch["summarize_mask"]))
    logits = np.exp(float(model.logit_scale[...])) * np.asarray(image) @ np.asarray(text).T
    rows = np.arange(B)
    itc = (cross_entropy(logits, rows).mean() + cross_entropy(logits.T, rows).mean()) / 2
    assert float(metrics["loss_itc"]) == pytest.approx(itc, rel=1e-4)

    mask = query_text_mask(Q, batch["text_mask"], "itg")
    hidden = model.fused(vision, batch["text"], mask).hidden[:, Q:]
    labels = np.asarray(batch["labels"])[:, 1:]
    each = cross_entropy(np.asarray(model.qllama.logits(hidden))[:, :-1], np.maximum(labels, 0))
    itg = each[labels >= 0].mean()
    assert float(metrics["loss_itg"]) == pytest.approx(itg, rel=1e-4)
    assert float(loss) == pytest.approx(itm + itc + itg, rel=1e-4)

    weighted = dataclasses.replace(generative, loss_weights=(0.5, 2.0, 0.0))
    assert float(weighted.loss(model, batch, None)[0]) == pytest.approx(
        0.5 * itm + 2 * itc, rel=1e-4
    )


def test_rows_of_empty_captions_are_left_out(generative, model_of, batch_of):
    """An ITM row of nothing but BOS and EOS, an ITC row of a bare "summarize:"."""
    model = model_of(generative)
    empty = np.arange(6) < 2
    lengths = np.array([4, 5, 6, 4, 5, 6])
    masks = np.arange(6) < lengths[:, None]
    masks[1] = empty
    batch = batch_of(generative, B, negative_mask=masks, positive_mask=masks, summarize_mask=masks)
    stage = dataclasses.replace(generative, empty_caption=2, empty_summary=2)
    _, metrics = stage.loss(model, batch, None)
    vision = model.image_tokens(normalize_images(batch["image"]))
    scores = [
        model.matching_score(vision, batch[k], batch[f"{k}_mask"]) for k in ("negative", "positive")
    ]
    each = cross_entropy(
        np.concatenate([scores[0][:3], scores[1][3:]]), np.array([0, 0, 0, 1, 1, 1])
    )
    kept = np.arange(B) != 1
    assert float(metrics["loss_itm"]) == pytest.approx(each[kept].mean(), rel=1e-4)
    image = unit(model.clip_projector2(model.query_states(vision)))
    text = unit(model.text_embedding(batch["summarize"], batch["summarize_mask"]))
    logits = np.exp(float(model.logit_scale[...])) * np.asarray(image) @ np.asarray(text).T
    rows = np.arange(B)  # the empty row stays a negative of the others
    both = (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2
    assert float(metrics["loss_itc"]) == pytest.approx(both[kept].mean(), rel=1e-4)


def test_hard_negatives_are_other_images_captions(generative, model_of, batch_of):
    stage = dataclasses.replace(generative, hard_negatives=True)
    ids = np.array([0, 0, 1, 1, 2, 2])
    model, batch = model_of(stage), batch_of(stage, B, image_id=ids)
    vision = model.image_tokens(normalize_images(batch["image"]))
    drawn = set()
    for step in range(20):
        mined = stage._mine(model, vision, batch, jax.random.fold_in(KEY, step))
        rows = (np.asarray(mined["negative"])[:, None] == np.asarray(batch["positive"])).all(-1)
        columns = rows.argmax(1)
        assert rows.any(1).all() and np.all(ids[columns] != ids)
        np.testing.assert_array_equal(mined["negative_mask"], batch["positive_mask"][columns])
        drawn.add(tuple(columns))
    assert len(drawn) > 1
    assert stage._mine(model, vision, batch, None) == {}  # evaluation keeps the loader's
    alone = {**batch, "image_id": jnp.zeros(B, jnp.int32)}
    kept = stage._mine(model, vision, alone, KEY)
    np.testing.assert_array_equal(kept["negative"], batch["negative"])


def test_retrieval_shares_its_targets(generative, model_of, batch_of):
    """Equal images share their captions; both image features are compared with the text."""
    stage = dataclasses.replace(generative, variant="retrieval")
    ids = np.array([0, 1, 1, 2, 3, 4])
    model, batch = model_of(stage), batch_of(stage, B, image_id=ids)
    loss, metrics = stage.loss(model, batch, None)
    vision = model.image_tokens(normalize_images(batch["image"]))
    text = np.asarray(unit(model.text_embedding(batch["summarize"], batch["summarize_mask"])))
    target = (ids[:, None] == ids).astype(float)
    target /= target.sum(1, keepdims=True)
    itc = 0.0
    for feature in (
        model.clip_projector2(model.query_states(vision)),
        model.clip_projector(vision),
    ):
        logits = np.exp(float(model.logit_scale[...])) * np.asarray(unit(feature)) @ text.T
        for z in (logits, logits.T):
            log = z - np.log(np.exp(z).sum(1, keepdims=True))
            itc += -(target * log).sum(1).mean() / 2
    assert float(metrics["loss_itc"]) == pytest.approx(itc, rel=1e-4)
    scores = [
        model.matching_score(vision, batch[k], batch[f"{k}_mask"]) for k in ("negative", "positive")
    ]
    labels = np.array([0] * B + [1] * B)
    itm = cross_entropy(np.concatenate(scores), labels).mean()
    assert float(metrics["loss_itm"]) == pytest.approx(itm, rel=1e-4)
    assert float(loss) == pytest.approx(itc + itm, rel=1e-4)


def test_language_loss_counts_learned_tokens(parts, model_of, batch_of):
    stage = LanguageStage(model=parts["text"], compute=parts["compute"], text_length=7, chunk=4)
    model, batch = model_of(stage), batch_of(stage, B)
    loss, metrics = stage.loss(model, batch, None)
    positions = jnp.broadcast_to(jnp.arange(7), (B, 7))
    x = model.llm.embed(batch["text"])
    hidden = model.llm(x, positions, causal_mask(batch["text_mask"])).hidden
    labels = np.asarray(batch["labels"])[:, 1:]
    logits = np.asarray(model.llm.logits(hidden))[:, :-1]
    each = cross_entropy(logits, np.maximum(labels, 0))
    learned = labels >= 0
    assert float(loss) == pytest.approx(each[learned].mean(), rel=1e-5)
    assert float(metrics["perplexity"]) == pytest.approx(np.exp(each[learned].mean()), rel=1e-4)
    hits = (logits.argmax(-1) == labels)[learned].mean()
    assert float(metrics["token_accuracy"]) == pytest.approx(hits)
    assert float(stage.weight(batch)) == learned.sum()


def test_finetuning_learns_answers_only(parts, model_of, batch_of):
    """Labels decide; the image's positions and the question give no loss but count as context."""
    llm = LlamaConfig(**{**vars(parts["text"]), "pad_id": None})
    stage = FinetuneStage(
        model=ChatConfig(vision=parts["vision"], llm=llm, projector="mlp1"),
        compute=parts["compute"],
        image_size=16,
        text_length=8,
        chunk=4,
    )
    text = np.full((2, 8), 5)
    text[:, 1] = IMAGE_TOKEN
    labels = np.full((2, 8), -100)
    labels[:, 5:] = [7, 9, 2]
    model = model_of(stage)
    batch = batch_of(stage, 2, text=text, labels=labels, segment=np.ones((2, 8), np.int32))
    loss, _ = stage.loss(model, batch, None)
    hidden = model.hidden(normalize_images(batch["image"]), batch["text"], batch["segment"])
    logits = np.asarray(model.llm.logits(hidden))[:, 4:7]
    expected = cross_entropy(logits, labels[:, 5:]).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(stage.weight(batch)) == 6
    other = {**batch, "image": 255 - batch["image"]}
    assert float(stage.loss(model, other, None)[0]) != pytest.approx(float(loss), rel=1e-4)
