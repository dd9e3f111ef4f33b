"""The checkpoints of one run: written in the background, checked when read, kept by rule."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from internvl_jax import tree as trees
from internvl_jax.checkpoint import storage
from internvl_jax.checkpoint.integrity import IntegrityError, fingerprints
from internvl_jax.checkpoint.links import linked
from internvl_jax.checkpoint.reading import read_arrays
from internvl_jax.checkpoint.storage import CheckpointError, Leaf, Meta

log = logging.getLogger(__name__)

PyTree = Any
REJECTED = "rejected"


@dataclasses.dataclass(frozen=True)
class _Retention:
    """Which steps stay: the last N, every M-th, the best."""

    keep: int
    keep_every: int | None
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best()}
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        return [step in kept for step in steps]


def _orbax_in_one_line(record: logging.LogRecord) -> bool:
    """Orbax logs the same traceback from several threads; what went wrong is said by us."""
    if "orbax" in record.pathname:
        record.exc_info = record.exc_text = None
    return True


class Checkpoints:
    """Saves and restores the state of a run in ``<workdir>/checkpoints``.

    Problems with the disk never raise from ``save``: they become sentences that ``check_errors``
    returns, the run goes on, and the next save tries again. A checkpoint that turns out to be
    damaged is never deleted: it is set aside in ``<workdir>/rejected``.

    With several processes, all of them call every method, in the same order.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "max",
        async_: bool = True,
        stacked: Callable[[str], bool] = lambda path: False,
        link: bool = False,
    ) -> None:
        """Open the checkpoints of a run, and clear away what a killed run left half-written.

        Args:
            workdir: local directory or ``gs://`` address; created where it doesn't exist.
            keep: how many of the newest checkpoints stay.
            keep_every: every step divisible by this stays as well.
            best_metric: the checkpoint best by this metric stays as well.
            best_mode: ``max`` or ``min``.
            async_: write in the background.
            stacked: tells from its path whether a leaf has a leading layer axis; such leaves are
                stored one chunk per layer.
            link: don't store again what lies unchanged in another run's checkpoint, see
                ``came_from``.

        Raises:
            ValueError: an argument is out of range.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep={keep} and keep_every={keep_every} must be at least 1.")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode is {best_mode!r}; it must be 'max' or 'min'.")
        self.directory = storage.absolute(workdir) / storage.DIRECTORY
        self._stacked, self._link = stacked, link
        self._elsewhere: dict[str, Leaf] = {}
        self._best = best_metric, (1 if best_mode == "max" else -1)
        self._scores: dict[int, float] = {}
        self._problems: list[str] = []
        self._pending: int | None = None
        self._retention, self._async = _Retention(keep, keep_every, self.best), async_
        logging.getLogger("absl").addFilter(_orbax_in_one_line)
        self._orbax = self._open()
        for step in self.steps() if best_metric else []:
            with contextlib.suppress(CheckpointError):  # restore will say so, if it gets there
                self._score(step, storage.load_meta(self.directory / str(step)).metrics)
        self._committed = self.latest()

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager; all processes wait for one another here."""
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("state", ocp.args.PyTreeSave, storage.handler())
        registry.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # One protocol on local disks and on object stores, where a rename is a copy.
                atomicity_options=ocp.options.AtomicityOptions(
                    mode=ocp.options.AtomicityMode.COMMIT_FILE
                ),
                preservation_policy=self._retention,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=self._async,
            ),
            handler_registry=registry,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps whose writing was finished, as process 0 sees the directory.

        Returns:
            The steps, ascending.
        """
        steps = storage.committed_steps(self.directory)
        if jax.process_count() == 1:
            return steps
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        mine = (steps + [0] * count)[:count]
        return [int(s) for s in multihost_utils.broadcast_one_to_all(np.array(mine, np.int32))]

    def latest(self) -> int | None:
        """The newest finished step, or None.

        Returns:
            The step.
        """
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step best by the chosen metric (the newest of equals), or None.

        Returns:
            The step.
        """
        return max(self._scores, key=lambda step: (self._scores[step], step), default=None)

    @property
    def committed(self) -> int | None:
        """The newest step known to be safely on disk: a metric worth showing."""
        return self._committed

    def _score(self, step: int, metrics: Mapping[str, float]) -> None:
        name, sign = self._best
        value = metrics.get(name) if name else None
        if value is not None and math.isfinite(value):
            self._scores[step] = sign * value

    def came_from(self, leaves: Mapping[str, Leaf]) -> None:
        """Say which leaves of the state were read from another checkpoint; restore does it itself.

        Args:
            leaves: as they were after reading, with their places, by the path they have in the
                state. Those that are the same at a save are linked, all others are stored.
        """
        self._elsewhere = {path: leaf for path, leaf in leaves.items() if leaf.at is not None}

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Start saving; returns once the arrays may be overwritten.

        Args:
            step: how many updates the state has seen.
            state: any pytree of jax or numpy arrays; stored under its readable paths.
            meta: JSON values to find again at restore.
            metrics: metric values at this step, for the choice of the best.
            force: write even where this step exists already (the old one is set aside).

        Returns:
            Whether a save was started.

        Raises:
            TypeError: a leaf can't be stored, or meta is not JSON.
        """
        self._settle()
        flat = trees.flatten(state)
        for path, x in flat.items():
            if not isinstance(x, jax.Array | np.ndarray | np.generic):
                raise TypeError(f"leaf {path} is a {type(x).__name__}; make it an array.")
        if step in self.steps():
            if not force:
                return False
            self._set_aside(step, "it is being written again")
        try:
            prints = fingerprints({path: flat[path] for path in sorted(flat)})
        except IntegrityError as error:
            self._report(f"step {step} was not saved: {error}")
            return False
        leaves = {p: Leaf(tuple(x.shape), str(x.dtype), prints[p]) for p, x in flat.items()}
        if self._link:
            leaves, gone = linked(leaves, self._elsewhere, self.directory / str(step))
            for base in gone:
                self._report(f"{base} is gone: step {step} stores what was taken from it.")
        values = {name: float(value) for name, value in (metrics or {}).items()}
        document = Meta(step, leaves, dict(meta), values)
        arguments = storage.save_args(flat, document, self._stacked)
        self._score(step, values)
        self._pending = step
        try:
            self._orbax.save(step, args=arguments, force=True)
        except Exception as error:
            self._failed(step, error)
            return False
        return True

    def _failed(self, step: int, error: Exception) -> None:
        self._report(
            f"saving step {step} in {self.directory} failed ({storage.brief(error)}); the last "
            f"step on disk is {self._committed}, the run goes on and the next save tries again."
        )
        self._pending = None
        self._scores.pop(step, None)
        half, alone = self.directory / str(step), jax.process_count() == 1
        # Orbax raises before the step's other files are written; closing waits for them. With
        # several processes, all would have to close and open together.
        if alone:
            with contextlib.suppress(Exception):
                self._orbax.close()
        with contextlib.suppress(Exception):  # what can't go now goes at the next start
            if jax.process_index() == 0 and not (half / storage.COMMITTED).exists():
                half.rmtree()
        if not alone:
            self._orbax.reload()  # the directory is right, the manager's list is not
            return
        with contextlib.suppress(Exception):  # the next save finds a closed manager and says so
            self._orbax = self._open()

    def _report(self, sentence: str) -> None:
        log.error(sentence)
        self._problems.append(sentence)

    def _settle(self) -> None:
        """Wait for the save under way and note how it ended."""
        step, problem = self._pending, None
        if step is None:
            return
        try:
            self._orbax.wait_until_finished()
            self._orbax.check_for_errors()
        except Exception as error:
            problem = error
        committed = storage.committed_steps(self.directory)  # a local look: no process waits
        if problem is None and step not in committed and jax.process_index() == 0:
            problem = CheckpointError("it was not finished")
        if problem is not None:
            return self._failed(step, problem)
        self._pending, self._committed = None, step
        self._scores = {s: score for s, score in self._scores.items() if s in committed}

    def wait(self) -> int | None:
        """Wait until the save under way has ended, well or badly.

        Returns:
            The newest step safely on disk: compare it with the step that was to be saved.
        """
        self._settle()
        return self._committed

    def check_errors(self) -> list[str]:
        """What went wrong since the last call; cheap enough for every step.

        Returns:
            Sentences, already logged; empty when all is well.
        """
        if self._pending is not None and not self._orbax.is_saving_in_progress():
            self._settle()
        problems, self._problems = self._problems, []
        return problems

    def restore(
        self, abstract: PyTree, step: int | None = None, *, cast: bool = False
    ) -> tuple[PyTree, dict[str, Any], int]:
        """Restore the newest good checkpoint, every leaf compared with its fingerprint.

        Args:
            abstract: pytree of ``jax.ShapeDtypeStruct`` with the shardings to restore onto (any
                mesh); leaves without a sharding come back as numpy arrays.
            step: this step and no other; by default the newest that is intact.
            cast: leaves may have another dtype in the checkpoint and are converted.

        Returns:
            The state in the structure of ``abstract``, the meta given to ``save``, the step.

        Raises:
            CheckpointError: there is no checkpoint, or none is intact, or the one that stores some
                of its leaves is gone.
            CheckpointMismatch: an intact one holds other leaves, shapes or dtypes.
        """
        self._settle()
        wanted = trees.flatten(abstract)
        candidates = [step] if step is not None else self.steps()[::-1]
        damaged: dict[int, str] = {}
        for candidate in candidates:
            try:
                arrays, meta = self._read(candidate, wanted, cast)
            except storage.MissingBase:
                raise  # nothing is wrong with this step
            except CheckpointError as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                aside = self._set_aside(bad, reason)
                log.error(
                    f"the checkpoint of step {bad} is damaged ({reason}) and is kept in {aside}; "
                    f"going back to step {candidate}."
                )
            self._committed = candidate if step is None else self._committed
            self.came_from(meta.leaves)
            return trees.like(abstract, arrays), meta.user, candidate
        if not damaged:
            raise CheckpointError(f"there is no finished checkpoint in {self.directory}.")
        reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be restored ({reasons}); nothing was deleted: "
            "name another work directory to start anew."
        )

    def _read(
        self, step: int, wanted: Mapping[str, Any], cast: bool
    ) -> tuple[dict[str, Any], Meta]:
        step_dir, problem, meta = self.directory / str(step), None, None
        try:
            if not (step_dir / storage.COMMITTED).exists():
                raise CheckpointError(f"there is no finished checkpoint of step {step}.")
            meta = storage.load_meta(step_dir)
        except CheckpointError as error:
            problem = error
        storage.agree(problem, f"reading {step_dir}")
        assert meta is not None  # or agree has raised
        storage.compare(meta, wanted, step_dir, cast=cast)
        return read_arrays(step_dir, meta, wanted), meta

    def _set_aside(self, step: int, reason: str) -> epath.Path:
        """Move a step out of the way of later saves and of retention, deleting nothing."""
        source = self.directory / str(step)
        # Beside the directory: inside, Orbax takes it for something half-written and deletes it.
        names = (self.directory.parent / REJECTED / f"{step}-{n}" for n in range(1000))
        target = next(name for name in names if not name.exists())
        try:
            if jax.process_index() == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                # First: on an object store a directory exists once there is a file in it.
                (target.parent / f"{target.name}.txt").write_text(reason + "\n")
                source.rename(target)
        except Exception as error:
            self._report(f"{source} could not be moved to {target} ({error}).")
            target = source
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._scores.pop(step, None)
        self._orbax.reload()
        return target

    def close(self) -> None:
        """Wait for the save under way and release what the manager holds."""
        self._settle()
        with contextlib.suppress(Exception):  # reported by _settle already
            self._orbax.close()
