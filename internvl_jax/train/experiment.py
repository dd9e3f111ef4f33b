"""A run as data: what a file in ``configs/`` resolves to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.config import DataConfig, Part
from internvl_jax.config import ConfigError, build, complete
from internvl_jax.sharding.mesh import MeshConfig
from internvl_jax.sharding.rules import batch_shards, head_shards
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.registry import STAGES, stage_from_config
from internvl_jax.stages.stage import EmbeddingStage, Stage
from internvl_jax.train.optimizer import OptimConfig

OWNED_BY_STAGE = (
    "image_size",
    "text_length",
    "vocab_size",
    "visual_tokens",
    "image_slots",
    "canvas",
)
"""Settings of the data pipeline that are the stage's to say (`Experiment.data_config`)."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with its own settings of the stage.

    Attributes:
        until: the step at which it ends (exclusive); the last phase ends with the run.
        stage: settings that replace the stage's, e.g. ``{"image_size": 224, "keep": 1.0}``; of a
            group only those that are given.
    """

    until: int
    stage: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One checkpoint that parameters come from.

    Attributes:
        path: a run's folder.
        rename: (old prefix, new prefix) pairs from its paths to this model's.
    """

    path: str
    rename: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a run starts from when it does not resume; no sources start from scratch.

    Attributes:
        sources: earlier runs; together they fill the model.
        new_ok: regular expressions of this model's paths that may be new.
        dropped_ok: regular expressions of source paths that may be left behind.
    """

    sources: tuple[SourceConfig, ...] = ()
    new_ok: tuple[str, ...] = ()
    dropped_ok: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch, and how often what happens.

    Attributes:
        steps: number of updates.
        global_batch: examples per update over all devices.
        accumulate: microbatches per update.
        grad_cache: cache gradients, so that a contrastive loss still sees the global batch.
        frozen_dtype: of parameters that are not trained.
        frozen_layout: ``default``; or ``auto``: frozen parameters rest as the compiled step reads
            them, where it would else copy whole stacks of layers (one chip, `train.step.settle`).
        frozen_in_checkpoints: ``stored`` with every step; or ``linked``: those that came unchanged
            from another checkpoint stay there, and a step names the place.
        log_every, eval_every, save_every: in steps; 0 for eval_every is never.
        eval_batches: validation batches per evaluation.
        keep, keep_every: checkpoints kept: the newest, and every so many steps for good.
        best_metric, best_mode: the best checkpoint by e.g. ``validation/loss`` is kept as well.
        max_bad_records: share of records that may fail to decode before the run stops.
        profile: (first, last) step of a profiler window.
        tensorboard, wandb: further metric writers; wandb names the project.
        compiler_options: for the step, beside those that `chips` has for the accelerator.
    """

    steps: int
    global_batch: int
    accumulate: int = 1
    grad_cache: bool = False
    frozen_dtype: str = "bfloat16"
    frozen_layout: str = "default"
    frozen_in_checkpoints: str = "stored"
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 4
    save_every: int = 1000
    keep: int = 3
    keep_every: int = 0
    best_metric: str = ""
    best_mode: str = "min"
    max_bad_records: float = 0.01
    profile: tuple[int, ...] = ()
    tensorboard: bool = False
    wandb: str = ""
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if min(self.steps, self.global_batch, self.accumulate, self.log_every, self.save_every) < 1:
            raise ValueError(
                "steps, global_batch, accumulate, log_every and save_every must be at least 1."
            )
        if self.frozen_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"frozen_dtype={self.frozen_dtype!r}: use bfloat16 or float32.")
        if self.frozen_layout not in ("default", "auto"):
            raise ValueError(f"frozen_layout={self.frozen_layout!r}: use default or auto.")
        if self.frozen_in_checkpoints not in ("stored", "linked"):
            raise ValueError(
                f"frozen_in_checkpoints={self.frozen_in_checkpoints!r}: use stored or linked."
            )
        if self.global_batch % self.accumulate:
            raise ValueError(
                f"global_batch={self.global_batch} does not split into "
                f"accumulate={self.accumulate} parts."
            )
        if len(self.profile) not in (0, 2):
            raise ValueError("profile takes two steps, first and last.")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run depends on; equal experiments on equal data give equal runs.

    Attributes:
        stage: what is learned.
        data: settings of the data pipeline; image size, text length and visual tokens come from
            the stage.
        phases: scheduled changes of the stage, in order; empty for none.
        topology: the TPU slices that mesh and rematerialisation were chosen for, e.g. v5p:8x8x8;
            `plan` takes them unless told others.
    """

    stage: Stage
    train: TrainConfig
    data: dict[str, Any]
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    init: InitConfig = InitConfig()
    phases: tuple[Phase, ...] = ()
    topology: str = ""
    seed: int = 0

    def __post_init__(self):
        ends = [p.until for p in self.phases]
        if ends and (ends != sorted(set(ends)) or ends[-1] != self.train.steps):
            raise ConfigError(
                f"config.phases end at steps {ends}: they must rise and end with "
                f"train.steps={self.train.steps}."
            )
        self.schedule()
        if self.train.grad_cache and not isinstance(self.stage, EmbeddingStage):
            raise ConfigError(
                f"config.train.grad_cache: the loss of stage {self.stage.name!r} is no function of "
                "embeddings; use train.accumulate alone."
            )

    def schedule(self) -> list[tuple[int, Stage]]:
        """(end, stage) of every phase."""
        if not self.phases:
            return [(self.train.steps, self.stage)]
        return [
            (p.until, _with(self.stage, p.stage, f"config.phases[{i}].stage"))
            for i, p in enumerate(self.phases)
        ]

    def on(self, mesh: Mesh) -> Experiment:
        """The same experiment with vision heads padded so that they split over the mesh.

        Raises:
            ConfigError: the batch does not split over its devices and the microbatches.
        """
        settings, shards = self.train, batch_shards(mesh)
        if settings.global_batch % (shards * settings.accumulate):
            raise ConfigError(
                f"config.train.global_batch={settings.global_batch} does not split over "
                f"{shards} devices and {settings.accumulate} microbatches: choose a "
                f"multiple of {shards * settings.accumulate}."
            )
        compute = self.stage.compute
        multiple = math.lcm(compute.head_multiple, head_shards(mesh))
        compute = dataclasses.replace(compute, head_multiple=multiple)
        return dataclasses.replace(self, stage=dataclasses.replace(self.stage, compute=compute))

    def data_config(self, stage: Stage) -> dict[str, Any]:
        """The data pipeline's settings under a phase's stage."""
        settings = {
            **self.data,
            "image_size": stage.image_size,
            "text_length": stage.text_length,
            "vocab_size": stage.vocab_size,
            "canvas": stage.canvas,
        }
        if isinstance(stage, FinetuneStage):
            settings["visual_tokens"] = stage.model.visual_tokens(stage.image_size)
            settings["image_slots"] = stage.image_slots
        return settings


def _with(group: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A dataclass with some fields replaced, those of nested groups too."""
    current = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
    for name, value in changes.items():
        nested = dataclasses.is_dataclass(current.get(name)) and isinstance(value, Mapping)
        current[name] = _with(current[name], value, f"{where}.{name}") if nested else value
    return build(type(group), current, where)


def resolve(config: Any) -> Experiment:
    """ConfigDict -> Experiment.

    Raises:
        ConfigError: one sentence naming the setting that cannot be right.
    """
    values = dict(config.items())
    if "stage" not in values:
        raise ConfigError("config.stage is missing: give it a name and settings.")
    values["stage"] = stage_from_config(values["stage"])
    return build(Experiment, values)


def _complete_data(config: Any) -> None:
    if "data" not in config:
        config.data = ConfigDict()
    mixture: Any = complete(config.data, DataConfig).mixture
    for name in mixture:
        complete(mixture[name], Part)
    for name in OWNED_BY_STAGE:
        if name in config.data:
            del config.data[name]


def completed(config: Any) -> Any:
    """A ConfigDict with every setting of an `Experiment` in it, so that any can be overridden.

    Raises:
        ConfigError: the stage has no name, or an unknown one.
    """
    stage = config.get("stage", {})
    if stage.get("name") not in STAGES:
        raise ConfigError(f"config.stage.name is missing: use one of {', '.join(STAGES)}.")
    complete(stage, STAGES[stage.name])
    for name, cls in (
        ("train", TrainConfig),
        ("optim", OptimConfig),
        ("mesh", MeshConfig),
        ("init", InitConfig),
    ):
        if name not in config:
            config[name] = ConfigDict()
        complete(config[name], cls)
    _complete_data(config)
    for name, default in (("phases", ()), ("topology", "")):
        if name not in config:
            config[name] = default
    return config
