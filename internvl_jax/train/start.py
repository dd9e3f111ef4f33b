"""Where a run starts: its own checkpoint, earlier stages, or scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from internvl_jax.checkpoint import (
    Checkpoints,
    CheckpointSource,
    Report,
    Start,
    Transfer,
    initialize,
    scratch_from,
)
from internvl_jax.checkpoint.integrity import fingerprints
from internvl_jax.checkpoint.storage import Leaf
from internvl_jax.models.definition import Definition, Tree
from internvl_jax.nn.embed import resize_positions
from internvl_jax.sharding.rules import replicated
from internvl_jax.train.experiment import Experiment, InitConfig
from internvl_jax.train.step import TrainState, initial_state
from internvl_jax.tree import flatten, unflatten


class JoinedSource:
    """Several checkpoints as one source, each under its own renaming."""

    def __init__(self, config: InitConfig):
        self._parts = [(CheckpointSource(s.path), dict(s.rename)) for s in config.sources]

    @property
    def name(self) -> str:
        return " + ".join(source.name for source, _ in self._parts)

    def _origin(self) -> dict[str, tuple[CheckpointSource, str]]:
        found: dict[str, tuple[CheckpointSource, str]] = {}
        for source, rename in self._parts:
            for path in source.leaves():
                prefix = next((p for p in rename if path == p or path.startswith(f"{p}/")), None)
                new = path if prefix is None else rename[prefix] + path[len(prefix) :]
                found.setdefault(new, (source, path))
        return found

    def leaves(self) -> Mapping[str, Any]:
        """Shape and dtype by (renamed) path; where two sources hold one path, the first wins."""
        return {new: source.leaves()[path] for new, (source, path) in self._origin().items()}

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """The wanted leaves, each from the source that has it."""
        origin, arrays = self._origin(), {}
        for source, _ in self._parts:
            mine = {origin[p][1]: p for p in wanted if origin[p][0] is source}
            read = source.read({old: wanted[new] for old, new in mine.items()})
            arrays.update({mine[old]: array for old, array in read.items()})
        return arrays


def abstract_state(
    definition: Definition, tx: optax.GradientTransformation, experiment: Experiment, mesh: Mesh
) -> tuple[TrainState, Tree]:
    """State and frozen parameters of a run as shapes with shardings: for jit, restore and plan.

    A leaf of the optimizer whose path ends in a parameter's path, with its shape, lives where the
    parameter does; counters are on every device.
    """
    params, frozen = definition.abstract(mesh, jnp.dtype(experiment.train.frozen_dtype))
    flat = flatten(params)
    state = jax.eval_shape(lambda p: initial_state(p, tx, experiment.optim), params)

    def place(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
        sharding: NamedSharding = replicated(mesh)
        for start in range(len(names)):
            like = flat.get("/".join(names[start:]))
            if like is not None and like.shape == leaf.shape:
                sharding = like.sharding
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state), frozen


def stored(state: TrainState, frozen: Tree) -> Tree:
    """What a checkpoint holds: ``params/…``, ``frozen/…``, ``ema/…``, ``opt/…`` and counters."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)} | {"frozen": frozen}


def loaded(tree: Tree) -> tuple[TrainState, Tree]:
    """The inverse of `stored`."""
    return TrainState(**{k: v for k, v in tree.items() if k != "frozen"}), tree["frozen"]


def start(
    definition: Definition,
    tx: optax.GradientTransformation,
    experiment: Experiment,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> Start:
    """The stored state to begin with: resume > handoff from `experiment.init` > scratch.

    Raises:
        CheckpointMismatch: a source does not fit, in one sentence.
        CheckpointError: what should be read is damaged.
    """
    state, frozen = abstract_state(definition, tx, experiment, mesh)
    params = unflatten({**flatten(state.params), **flatten(frozen)})
    init = experiment.init
    handoff = None
    if init.sources:
        handoff = Transfer(
            JoinedSource(init),
            new_ok=init.new_ok,
            dropped_ok=init.dropped_ok,
            resize=((r"vision/pos", _resize_table),),
            cast=True,
        )

    def assemble(tree: Any) -> Tree:
        flat = flatten(tree)
        trained = unflatten({p: x for p, x in flat.items() if definition.trainable(p)})
        frozen = unflatten({p: x for p, x in flat.items() if not definition.trainable(p)})
        shardings = jax.tree.map(lambda s: s.sharding, state)
        create = jax.jit(lambda p: initial_state(p, tx, experiment.optim), out_shardings=shardings)
        return stored(create(trained), frozen)

    begun = initialize(
        checkpoints,
        stored(state, frozen),
        params,
        scratch=scratch_from(lambda: definition.fresh(experiment.seed), params),
        assemble=assemble,
        handoff=handoff,
    )
    if handoff is not None and begun.report and experiment.train.frozen_in_checkpoints == "linked":
        checkpoints.came_from(_places(handoff, begun.report, flatten(begun.state["frozen"])))
    return begun


def _places(handoff: Transfer, report: Report, frozen: dict[str, jax.Array]) -> dict[str, Leaf]:
    """What is frozen and was not resized, and where it came from, by path in the stored state."""
    source = handoff.source.leaves()
    kept = {path: frozen[path] for path in sorted(frozen) if path in report.loaded}
    prints = fingerprints(kept)
    return {
        f"frozen/{path}": Leaf(
            tuple(x.shape), str(x.dtype), prints[path], source[report.loaded[path]].at
        )
        for path, x in kept.items()
    }


def _resize_table(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    side = round((shape[0] - 1) ** 0.5)
    return np.asarray(resize_positions(jnp.asarray(table), (side, side)))
