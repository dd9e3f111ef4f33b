"""The protocol: names, what is trained, how fast, and the way through a checkpoint's meta."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.config import ConfigError
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.finetune import TRAIN_MLP, FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.language import LanguageStage
from internvl_jax.stages.registry import STAGES, stage_from_config, stage_to_config
from internvl_jax.stages.stage import randomness


def every_stage() -> list[Any]:
    return [
        LanguageStage(text_length=7),
        ContrastiveStage(keep=0.5, lr_scales=((r"qllama/", 0.1),)),
        GenerativeStage(variant="retrieval", layer_decay=0.9, empty_caption=2),
        FinetuneStage(trainable_paths=TRAIN_MLP, text_length=2048, image_slots=2),
    ]


def test_the_registry_knows_every_stage():
    assert {type(s) for s in every_stage()} == set(STAGES.values())
    assert list(STAGES) == ["language", "contrastive", "generative", "finetune"]


@pytest.mark.parametrize("stage", every_stage(), ids=lambda s: s.name)
def test_a_stage_survives_json(stage):
    assert stage_from_config(json.loads(json.dumps(stage_to_config(stage)))) == stage


def test_unknown_stages_and_settings_are_named():
    with pytest.raises(ConfigError, match=r"config.stage.name is 'sft': use one of language, "):
        stage_from_config(dict(name="sft"))
    with pytest.raises(ConfigError, match=r"config.stage has no setting 'text_lenght'"):
        stage_from_config(dict(name="language", text_lenght=3))
    with pytest.raises(ConfigError, match=r"config.stage.model.vision has no setting 'dept'"):
        stage_from_config(dict(name="contrastive", model=dict(vision=dict(dept=3))))
    with pytest.raises(ConfigError, match="Unknown activation 'all'"):
        stage_from_config(dict(name="language", compute=dict(remat="all")))


def test_batches_are_what_the_data_module_says():
    spec = FinetuneStage(text_length=1200, image_slots=2, image_size=224).batch_spec(6)
    assert spec["image"].shape == (6, 2, 224, 224, 3) and spec["image"].dtype == np.uint8
    assert spec["labels"].shape == (6, 1200)
    spec = ContrastiveStage(text_length=9, image_size=196).batch_spec(4)
    assert {k: v.shape for k, v in spec.items()} == {
        "image": (4, 196, 196, 3),
        "text": (4, 9),
        "text_mask": (4, 9),
    }


@pytest.mark.parametrize(
    ("stage", "trained", "frozen"),
    [
        (
            ContrastiveStage(),
            [
                "vision/pos",
                "qllama/norm/scale",
                "clip_projector/q",
                "text_projection",
                "logit_scale",
            ],
            ["qllama/lm_head"],
        ),
        (
            GenerativeStage(),
            [
                "query_tokens",
                "qllama/periods/layers/first/cross/q",
                "clip_projector2/out",
                "itm_head",
            ],
            ["vision/pos", "clip_projector/q", "text_projection", "qllama/norm/scale"],
        ),
        (
            FinetuneStage(text_length=2048, trainable_paths=TRAIN_MLP),
            ["projector/fc1", "query_projector/fc2_bias"],
            ["llm/embedding", "vision/pos", "query_tokens"],
        ),
        (
            FinetuneStage(text_length=2048),
            ["projector/norm/scale", "llm/lm_head"],
            ["qllama/norm/scale"],
        ),
        (LanguageStage(), ["llm/embedding"], []),
    ],
    ids=["contrastive", "generative", "projector alone", "finetune", "language"],
)
def test_what_each_stage_trains(stage, trained, frozen):
    assert all(stage.trainable(p) for p in trained)
    assert not any(stage.trainable(p) for p in frozen)


def test_the_first_rate_that_matches_counts():
    stage = ContrastiveStage(lr_scales=(("qllama/norm", 0.5), ("qllama/", 0.1)))
    assert stage.lr_scale("qllama/norm/scale", (4,)) == 0.5
    assert stage.lr_scale("qllama/embedding", (4,)) == 0.1
    assert stage.lr_scale("vision/pos", (4,)) == 1.0


def test_evaluation_draws_nothing():
    assert randomness({"example": jnp.arange(2)}, None) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContrastiveStage(keep=0.0), r"keep=0.0 must lie in \(0, 1\]"),
        (lambda: ContrastiveStage(objective="hinge"), "objective='hinge': use softmax or sigmoid"),
        (lambda: ContrastiveStage(objective="sigmoid"), "set both or neither"),
        (lambda: GenerativeStage(variant="sft"), "variant='sft': use pretrain or retrieval"),
        (
            lambda: GenerativeStage(model=ContrastiveStage().model),
            "needs queries: set model.queries above 0",
        ),
        (
            lambda: FinetuneStage(model=ChatConfig(), image_size=336, text_length=500),
            "text_length=500 cannot hold the 576 visual tokens",
        ),
    ],
)
def test_impossible_stages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_masking_keeps_a_share_of_the_patches():
    stage = ContrastiveStage(image_size=196, keep=0.5)
    assert (stage.patches, stage.kept) == (196, 98)
    assert dataclasses.replace(stage, image_size=224, keep=1.0).kept is None
    assert dataclasses.replace(stage, keep=0.001).kept == 1
