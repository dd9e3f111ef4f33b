"""The train loop: phases of steps; between steps it logs, evaluates, saves and listens.

It names no stage: what differs between stages lives in `stages`.
"""

from __future__ import annotations

import collections
import logging
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines.drawing import BadRecordsError
from data_pipelines.pipeline import HostBatch, Pipeline, make_pipeline
from internvl_jax.checkpoint import Checkpoints, Preemption, Report
from internvl_jax.chips import peak_flops
from internvl_jax.config import ConfigError, to_dict
from internvl_jax.models.definition import Definition, Tree
from internvl_jax.observe.profile import Profiler
from internvl_jax.observe.progress import Progress
from internvl_jax.observe.throughput import Ledger, mfu, stall
from internvl_jax.observe.writer import open_writers
from internvl_jax.sharding.mesh import make_mesh
from internvl_jax.sharding.rules import batch_sharding
from internvl_jax.stages.registry import stage_to_config
from internvl_jax.stages.stage import Batch, Metrics, Stage
from internvl_jax.train.experiment import Experiment
from internvl_jax.train.optimizer import make_optimizer
from internvl_jax.train.start import loaded, start, stored
from internvl_jax.train.step import TrainState, jit_step, settle

log = logging.getLogger(__name__)

DONE, FAILED, BAD_RECORDS, NON_FINITE, PREEMPTED = 0, 1, 65, 70, 75


class Stop(Exception):
    """A reason to end the run: an exit code and a sentence."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


def train(experiment: Experiment, workdir: str, *, title: str = "") -> int:
    """Runs an experiment to its end, from wherever its work directory stands.

    Args:
        experiment: what to do.
        workdir: local folder or ``gs://`` address that holds everything the run writes.
        title: in front of the progress line.

    Returns:
        The exit code: 0 done, 1 the last checkpoint could not be written, 65 too many bad records,
        70 non-finite too often, 75 preempted and saved.

    Raises:
        ConfigError, CheckpointMismatch, CheckpointError: one sentence each.
    """
    try:
        mesh = make_mesh(experiment.mesh)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    experiment = experiment.on(mesh)
    with jax.set_mesh(mesh), Preemption() as preemption:
        run = Run(experiment, workdir, mesh, title or experiment.stage.name)
        try:
            run.go(preemption)
        except Stop as stop:
            log.error(str(stop))
            return stop.code
        finally:
            run.close()
    return DONE


def describe(workdir: str, state: TrainState, frozen: Tree, report: Report | None) -> None:
    """Says what was handed over, and lists all parameters in ``<workdir>/parameters.txt``."""
    from clu import parameter_overview

    if report is not None:
        print(report.table(), file=sys.stderr)
    tables = [
        f"{name}\n{parameter_overview.get_parameter_overview(tree, include_stats=False)}\n"
        for name, tree in (("trained", state.params), ("frozen", frozen))
        if tree
    ]
    try:
        (epath.Path(workdir) / "parameters.txt").write_text("\n".join(tables))
    except OSError as error:
        log.error(f"The list of parameters could not be written ({error}); the run goes on.")


def _placed(definition: Definition, mesh: Mesh, frozen_dtype: str) -> Tree:
    """The trained parameters as shapes. Raises ConfigError where there are none, or no place."""
    try:
        params, _ = definition.abstract(mesh, frozen_dtype)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    if not params:
        raise ConfigError(
            "config.stage.trainable_paths match no parameter: nothing would be trained; "
            "parameters.txt of any run lists the paths."
        )
    return params


class Run:
    """One run in one process: everything it needs, built once."""

    def __init__(self, experiment: Experiment, workdir: str, mesh: Mesh, title: str):
        self.experiment, self.mesh = experiment, mesh
        stage, settings = experiment.stage, experiment.train
        self.ledger = Ledger(workdir)
        with self.ledger.timed("init"):
            definition = Definition.of(stage.build, stage.trainable)
            params = _placed(definition, mesh, settings.frozen_dtype)
            self.tx = make_optimizer(experiment.optim, settings.steps, params, stage.lr_scale)
            self.checkpoints = Checkpoints(
                workdir,
                keep=settings.keep,
                keep_every=settings.keep_every or None,
                best_metric=settings.best_metric or None,
                best_mode=settings.best_mode,
                stacked=definition.stacked,
                link=settings.frozen_in_checkpoints == "linked",
            )
            begun = start(definition, self.tx, experiment, mesh, self.checkpoints)
        self.state, self.frozen = loaded(begun.state)
        if jax.process_index() == 0:
            describe(workdir, self.state, self.frozen, begun.report)
        self.step = self.first = begun.step
        self.ledger.resumed(self.step)
        self.key = jax.random.key(experiment.seed)
        self.logged = self.step
        self.seen, self.bad = 0, collections.Counter[str]()  # examples, bad records by reason
        self.order = begun.meta.get("data", "")
        self.records = np.zeros(0, np.int64)
        self.last: Metrics | None = None
        self.scores: dict[str, float] = {}
        self.writers = open_writers(
            workdir,
            resume_step=self.step,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            config=to_dict(experiment),
        )
        self.progress = Progress(settings.steps, settings.global_batch, title=title)
        self.profiler = Profiler(workdir, settings.profile)

    def go(self, preemption: Preemption) -> None:
        """The phases that are left, step by step. Raises Stop with a reason to end early."""
        settings = self.experiment.train
        if 0 < settings.eval_every <= settings.steps:
            # A held-out split that is missing must not come to light hours later.
            self._pipeline(self.experiment.stage, "validation").close()
        for until, stage in self.experiment.schedule():
            if self.step >= until:
                continue
            update, score = self._compile(stage)
            for batch in self._batches(stage, until):
                self.profiler.step(self.step)
                with self.ledger.timed("step"):
                    self.state, metrics = update(self.state, self.frozen, batch, self.key)
                    self.step += 1
                    self._guard(metrics)
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    self._log(stage, metrics)
                if settings.eval_every and self.step % settings.eval_every == 0:
                    self._validate(stage, score)
                stop = preemption.requested(self.step)
                if stop or self.step % settings.save_every == 0 or self.step == settings.steps:
                    self._save(stage)
                if stop:
                    self._settle()
                    raise Stop(
                        PREEMPTED, f"Asked to stop: saved step {self.step}; start again to go on."
                    )
                self.checkpoints.check_errors()
        self._settle()

    def _settle(self) -> None:
        if self.checkpoints.wait() != self.step:
            raise Stop(
                FAILED,
                f"Step {self.step} could not be saved, step {self.checkpoints.committed} is: free "
                "some space and start again.",
            )

    def close(self) -> None:
        """Ends everything that writes or runs in the background."""
        self.profiler.close()
        self.progress.close()
        self.checkpoints.close()
        self.writers.close()
        self.ledger.close(self.first, self.step)

    def _compile(self, stage: Stage) -> tuple[Callable, Callable]:
        """A phase's update and its validation score; most are compiled at the first call."""
        # The phases of a run share their parameters; their static settings differ.
        definition = Definition.of(stage.build, stage.trainable)
        update: Any = jit_step(self.experiment, stage, definition, self.tx, self.state, self.frozen)
        if self.experiment.train.frozen_layout == "auto":
            rows = batch_sharding(self.mesh)
            batch = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
                for name, x in stage.batch_spec(self.experiment.train.global_batch).items()
            }
            update, self.frozen = settle(update, self.state, self.frozen, batch, self.key)

        def score(state: TrainState, frozen, batch: Batch) -> Metrics:
            loss, metrics = stage.loss(
                definition.merge(state.ema or state.params, frozen), batch, None
            )
            return {**metrics, "loss": loss}

        return update, jax.jit(score)

    def _pipeline(self, stage: Stage, split: str) -> Pipeline:
        try:
            return make_pipeline(
                self.experiment.data_config(stage),
                stage.name,
                global_batch=self.experiment.train.global_batch,
                seed=self.experiment.seed,
                split=split,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(f"config.data: {error}") from error

    def _batches(self, stage: Stage, until: int) -> Iterator[Batch]:
        """Global batches up to the end of the phase; broken records are counted on the way."""
        pipeline = self._pipeline(stage, "train")
        self._announce(pipeline)
        batches: Any = pipeline.iterate(self.step)
        try:
            while self.step < until:
                with self.ledger.timed("data"):
                    host = next(batches)
                    batch = self._put(host)
                self.bad.update(host.reasons)
                self.seen += len(host.records)
                self.records = np.ascontiguousarray(host.records, np.int64)
                yield batch
        except BadRecordsError as error:
            raise Stop(BAD_RECORDS, str(error)) from error
        finally:
            batches.close()
            pipeline.close()

    def _announce(self, pipeline: Pipeline) -> None:
        """Says how often the run sees its data, and whether a resumed one goes on in its order."""
        if self.order not in ("", pipeline.digest):
            log.warning(
                f"The data settings are not those that steps up to {self.step} were made with: the "
                "run goes on in the new order, and may meet records again before their turn."
            )
        elif not self.order and jax.process_index() == 0:
            for part in pipeline.drawn(self.experiment.train.steps):
                print(
                    f"data {part.name}: {part.records:,} units, {part.examples:,} examples, each "
                    f"seen {part.times:.3g} times",
                    file=sys.stderr,
                )
        self.order = pipeline.digest

    def _put(self, host: HostBatch) -> Batch:
        """This host's rows onto its devices, as its part of the global batch."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in host.arrays.items()
        }

    def _guard(self, metrics: Metrics) -> None:
        """Looks at the step before, so that one step is always under way on the device."""
        last, self.last = self.last, metrics
        limit = self.experiment.optim.max_bad_steps
        if last is not None and int(last["bad_streak"]) >= limit:
            raise Stop(
                NON_FINITE,
                f"{limit} updates in a row were skipped because loss or gradients were not finite "
                f"or spiked (step {self.step - 1}): lower optim.peak_lr or start from an older "
                "step.",
            )

    def _log(self, stage: Stage, metrics: Metrics) -> None:
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        settings = self.experiment.train
        spent = self.ledger.window()
        seconds = (spent["step"] + spent["data"]) / max(self.step - self.logged, 1)
        self.logged = self.step
        used = mfu(
            stage.flops() * settings.global_batch,
            max(seconds, 1e-9),
            peak_flops(jax.devices()[0].device_kind),
            jax.device_count(),
        )
        shown = {
            "loss": values["loss"],
            **{k: v for k, v in values.items() if k.startswith("loss_")},
        }
        shown |= {"mfu": used} if used is not None else {}
        self.progress.show(self.step, {**shown, "stall": stall(spent)})
        self.ledger.mark(self.step)
        records, bad, seen = self._records()
        self._write({**values, "records": records, "bad_records": bad}, "train")
        self._check_records(bad, seen)

    def _records(self) -> tuple[int, int, int]:
        """Of all hosts: a fingerprint of the last batch's record ids, broken and seen records."""
        # Sent as pairs of 32 bits: devices do not take more.
        counts = np.array([[self.bad.total(), self.seen]], np.int64)
        ids, halves = self.records.view(np.int32), counts.view(np.int32)
        if jax.process_count() > 1:
            ids, halves = multihost_utils.process_allgather((ids, halves))
        bad, seen = np.ascontiguousarray(halves).view(np.int64).reshape(-1, 2).sum(0)
        return zlib.crc32(ids.tobytes()), int(bad), int(seen)

    def _check_records(self, bad: int, seen: int) -> None:
        limit = self.experiment.train.max_bad_records
        if bad > max(limit * seen, 1):
            here = ", ".join(f"{reason} {count}" for reason, count in self.bad.most_common(5))
            raise Stop(
                BAD_RECORDS,
                f"{bad} of {seen} records could not be used, more than train.max_bad_records="
                f"{limit} (here: {here or 'none'}): repair the data or raise the limit.",
            )

    def _write(self, values: Mapping[str, float], group: str) -> None:
        self.writers.write(self.step, {f"{group}/{name}": value for name, value in values.items()})

    def _validate(self, stage: Stage, score: Callable[..., Metrics]) -> None:
        """Mean validation metrics over the first batches of the held-out split, always the same."""
        with self.ledger.timed("evaluate"):
            pipeline = self._pipeline(stage, "validation")
            count, total = self.experiment.train.eval_batches, {}
            try:
                for i in range(count):
                    batch = self._put(pipeline.batch(i))
                    metrics = jax.device_get(score(self.state, self.frozen, batch))
                    total = {k: total.get(k, 0.0) + float(v) / count for k, v in metrics.items()}
            except BadRecordsError as error:
                raise Stop(BAD_RECORDS, f"Validation: {error}") from error
            finally:
                pipeline.close()
        self.scores = {f"validation/{name}": value for name, value in total.items()}
        self._write(total, "validation")

    def _save(self, stage: Stage) -> None:
        with self.ledger.timed("save"):
            meta = {
                "stage": stage_to_config(stage),
                "experiment": to_dict(self.experiment),
                "records": self.seen,
                "data": self.order,
            }
            self.checkpoints.save(self.step, stored(self.state, self.frozen), meta, self.scores)
            self.writers.flush()
