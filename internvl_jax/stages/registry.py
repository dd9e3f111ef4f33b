"""The stages by name, and a stage from plain data."""

from __future__ import annotations

from typing import Any

from internvl_jax.config import ConfigError, build, to_dict
from internvl_jax.stages.contrastive import ContrastiveStage
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.language import LanguageStage
from internvl_jax.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (LanguageStage, ContrastiveStage, GenerativeStage, FinetuneStage)
}


def stage_from_config(values: Any, where: str = "config.stage") -> Stage:
    """A stage from ``{"name": ..., settings ...}``, as a config or a checkpoint's meta holds it.

    Args:
        values: a dict or ConfigDict.
        where: dotted name used in messages.

    Raises:
        ConfigError: one sentence naming the setting that cannot be right.
    """
    settings = dict(values.items())
    name = settings.pop("name", None)
    if name not in STAGES:
        raise ConfigError(f"{where}.name is {name!r}: use one of {', '.join(STAGES)}.")
    return build(STAGES[name], settings, where)


def stage_to_config(stage: Stage) -> dict[str, Any]:
    """The inverse of `stage_from_config`: plain data, ready for JSON."""
    return {"name": stage.name, **to_dict(stage)}
