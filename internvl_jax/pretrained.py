"""A trained model from a checkpoint: what evaluation, generation and export start from."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from internvl_jax.checkpoint import CheckpointSource, Transfer
from internvl_jax.checkpoint.storage import CheckpointError, find_step, load_meta
from internvl_jax.checkpoint.transfer import load as transfer
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.sharding.mesh import one_device
from internvl_jax.stages.registry import stage_from_config
from internvl_jax.stages.stage import Stage
from internvl_jax.tree import flatten, unflatten


def load(
    workdir: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    ema: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Stage, Any, dict[str, Any]]:
    """Restores the model of a run, without its optimizer.

    Args:
        workdir: the run's folder (the one that holds ``checkpoints``).
        step: which checkpoint; the newest by default.
        dtype: ``float32`` or ``bfloat16`` to compute in, instead of the run's.
        ema: take the moving average of the trained parameters.
        mesh: where to put it; the first device by default.

    Returns:
        The stage as it was trained, the module with its parameters, and what the run stored beside
        them (``stage``, ``step``, ``experiment``).

    Raises:
        CheckpointError, CheckpointMismatch: what is wrong with the checkpoint, in one sentence.
    """
    meta = load_meta(find_step(workdir, step))
    if "stage" not in meta.user:
        part = meta.user.get("part", {}).get("name", "part")
        raise CheckpointError(
            f"{workdir} holds a model's {part} alone, for a run to start from (init.sources)."
        )
    stage = stage_from_config(meta.user["stage"], f"the stage in {workdir}")
    compute = Compute(dtype=dtype or stage.compute.dtype, remat="none")
    stage = dataclasses.replace(stage, compute=compute)
    definition = Definition.of(stage.build, stage.trainable)
    trained, frozen = definition.abstract(mesh or one_device(), "float32")
    roots = ("ema", "params", "frozen") if ema else ("params", "frozen")
    source = CheckpointSource(workdir, meta.step, roots)
    arrays, _ = transfer({**flatten(trained), **flatten(frozen)}, Transfer(source, cast=True))
    return stage, definition.merge(unflatten(arrays)), {**meta.user, "step": meta.step}
