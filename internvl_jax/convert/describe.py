"""What a checkpoint says of the model it holds, and what an imported one is given to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_jax.config import build, to_dict
from internvl_jax.convert.key_maps import ModelConfig
from internvl_jax.convert.shards import WeightsError
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.language import LanguageStage
from internvl_jax.stages.registry import stage_from_config, stage_to_config
from internvl_jax.stages.stage import Stage

PARTS: dict[str, type] = {"vision": VitConfig, "qllama": LlamaConfig, "llm": LlamaConfig}
"""A part of a model on its own, by the path that it has in the whole."""


def model_of(user: Mapping[str, Any], where: str | Path) -> tuple[ModelConfig, str]:
    """The architecture of a checkpoint's model.

    Args:
        user: what the checkpoint stores beside its arrays.
        where: the checkpoint, for messages.

    Returns:
        The architecture, and the path below which its parameters are (``""`` or ``vision/`` …).

    Raises:
        ConfigError: the description cannot be right.
        WeightsError: the run has no model.
    """
    if part := user.get("part"):
        name = part["name"]
        return build(PARTS[name], part["model"], f"the part {name!r} in {where}"), f"{name}/"
    stage = stage_from_config(user.get("stage", {}), f"the stage in {where}")
    cfg = getattr(stage, "model", None)
    if not isinstance(cfg, VitConfig | LlamaConfig | InternVLConfig | ChatConfig):
        raise WeightsError(f"{where} is a run of the stage {stage.name!r}, which has no model.")
    return cfg, "llm/" if isinstance(stage, LanguageStage) else ""


def stage_for(cfg: InternVLConfig | ChatConfig) -> Stage:
    """The stage that a whole model comes from, with its own image size."""
    size: dict[str, Any] = dict(model=cfg, image_size=cfg.vision.image_size)
    if isinstance(cfg, ChatConfig):
        visual = cfg.visual_tokens(cfg.vision.image_size)
        return FinetuneStage(**size, text_length=max(2048, 2 * visual))
    return GenerativeStage(**size) if cfg.queries else ContrastiveStage(**size)


def described(cfg: ModelConfig, part: str = "") -> dict[str, Any]:
    """What a checkpoint of imported weights stores beside its arrays.

    Args:
        cfg: architecture.
        part: name in `PARTS`, for a tower or a decoder alone.
    """
    if part:
        return {"part": {"name": part, "model": to_dict(cfg)}}
    assert isinstance(cfg, InternVLConfig | ChatConfig)
    return {"stage": stage_to_config(stage_for(cfg))}


def resized(cfg: ModelConfig, image_size: int | None, vocab_size: int | None) -> ModelConfig:
    """The same architecture for other pictures, or with more words.

    Args:
        cfg: architecture.
        image_size: pixels; None keeps it.
        vocab_size: rows of the embedding of the LLM, or else of QLLaMA; None keeps it.

    Raises:
        WeightsError: if the model has no such part, or words would be lost.
    """
    if image_size is not None:
        if isinstance(cfg, LlamaConfig):
            raise WeightsError("A decoder has no image size: leave --image-size out.")
        vision = cfg if isinstance(cfg, VitConfig) else cfg.vision
        if image_size < 1 or image_size % vision.patch_size:
            raise WeightsError(
                f"The image size {image_size} is no multiple of the patch size {vision.patch_size}."
            )
        vision = dataclasses.replace(vision, image_size=image_size)
        cfg = vision if isinstance(cfg, VitConfig) else dataclasses.replace(cfg, vision=vision)
    if vocab_size is not None:
        if isinstance(cfg, VitConfig):
            raise WeightsError("A vision tower has no vocabulary: leave --vocab-size out.")
        if isinstance(cfg, InternVLConfig):
            return dataclasses.replace(cfg, qllama=_grown(cfg.qllama, vocab_size))
        if isinstance(cfg, ChatConfig):
            return dataclasses.replace(cfg, llm=_grown(cfg.llm, vocab_size))
        return _grown(cfg, vocab_size)
    return cfg


def _grown(cfg: LlamaConfig, vocab_size: int) -> LlamaConfig:
    if vocab_size < cfg.vocab_size:
        raise WeightsError(
            f"The vocabulary has {cfg.vocab_size} entries already: --vocab-size {vocab_size} would "
            "cut it."
        )
    return dataclasses.replace(cfg, vocab_size=vocab_size)
