"""Where a run starts: resume > handoff > weights > scratch. Decided here and nowhere else."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax

from internvl_jax import tree as trees
from internvl_jax.checkpoint.manager import Checkpoints
from internvl_jax.checkpoint.transfer import Report, Transfer, load

log = logging.getLogger(__name__)

PyTree = Any
Scratch = Callable[[Iterable[str]], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        state: the training state, placed on the mesh.
        step: how many updates it has seen.
        meta: what the checkpoint's ``save`` was given, when resumed; else empty.
        origin: which of the four it was.
        report: where the parameters came from, for handoff and weights.
    """

    state: PyTree
    step: int
    meta: dict[str, Any]
    origin: Literal["resume", "handoff", "weights", "scratch"]
    report: Report | None = None


def scratch_from(init: Callable[[], PyTree], abstract: PyTree) -> Scratch:
    """Initial values of chosen leaves, made where they will live, the others never computed.

    Args:
        init: makes all parameters as a pytree of arrays; traceable, deterministic.
        abstract: the same pytree of ``jax.ShapeDtypeStruct`` with shardings.

    Returns:
        Function from paths to arrays by path.
    """
    targets = trees.flatten(abstract)

    def scratch(paths: Iterable[str]) -> dict[str, jax.Array]:
        placement = {path: targets[path].sharding for path in paths}
        if not placement:
            return {}

        def chosen() -> dict[str, jax.Array]:
            values = trees.flatten(init())
            return {path: values[path].astype(targets[path].dtype) for path in placement}

        # It runs once: on a CPU, polishing the program would take longer than running it.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        return jax.jit(chosen, out_shardings=placement, compiler_options=options)()

    return scratch


def initialize(
    checkpoints: Checkpoints,
    abstract_state: PyTree,
    abstract_params: PyTree,
    *,
    scratch: Scratch,
    assemble: Callable[[PyTree], PyTree],
    handoff: Transfer | None = None,
    weights: Transfer | None = None,
) -> Start:
    """Start a run: from its own checkpoint, else another run's, else weights, else anew.

    Args:
        checkpoints: of this run; when it holds any, the newest good one wins over all else.
        abstract_state: the training state, ``jax.ShapeDtypeStruct`` with shardings.
        abstract_params: all parameters of the model, trained or frozen, likewise.
        scratch: gives initial values for the paths that nothing else fills (``scratch_from``).
        assemble: makes the training state from all parameters (same structure as
            ``abstract_params``): splits trained from frozen, makes the optimizer state.
        handoff: the stage before this one.
        weights: pretrained weights.

    Returns:
        The state and where it came from.

    Raises:
        CheckpointMismatch: a checkpoint or source doesn't fit the model, in one sentence.
        CheckpointError: what should be read is damaged.
    """
    if checkpoints.latest() is not None:
        state, meta, step = checkpoints.restore(abstract_state)
        log.info(f"resuming at step {step} of {checkpoints.directory}.")
        return Start(state, step, meta, "resume")
    targets = trees.flatten(abstract_params)
    origin: Literal["handoff", "weights", "scratch"] = "scratch"
    arrays: dict[str, Any] = {}
    report = None
    transfer = handoff or weights
    if transfer is not None:
        origin = "handoff" if handoff else "weights"
        if handoff and weights:
            log.info("both a handoff and weights are given: the handoff is used.")
        arrays, report = load(targets, transfer)
        log.info(report.table())
    arrays |= scratch([path for path in targets if path not in arrays])
    return Start(assemble(trees.like(abstract_params, arrays)), 0, {}, origin, report)
