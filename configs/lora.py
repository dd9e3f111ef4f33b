"""Adapters as a modifier: ``lora`` in the arguments of stages 2 and 3.

The base rests frozen in bfloat16; a checkpoint names the base's instead of storing it again.
``--config.stage.model.llm.lora.rank=8`` sets a tower's rank; 0 is a tower without adapters.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

PATHS = (r".*_lora/",)
RANK = 16  # as the released scripts; alpha = 2 rank


def apply(config: ConfigDict, towers: tuple[str, ...], trained: tuple[str, ...]) -> None:
    """Trains adapters instead of the towers.

    Args:
        config: the experiment.
        towers: of the model, that get adapters; the others can be given some.
        trained: further paths that are trained.
    """
    model: Any = config.stage.model
    for name in ("vision", "qllama", "llm"):
        if name in model:
            model[name].update(lora=dict(rank=RANK if name in towers else 0, dropout=0.05))
    config.stage.trainable_paths = (*trained, *PATHS)
    config.init.new_ok = (*config.init.get("new_ok", ()), r".*_lora/[ab]")
    config.train.frozen_in_checkpoints = "linked"
