"""Metric writers: JSONL always, TensorBoard and Weights & Biases as extras.

clu's own writers import TensorFlow, so they are not used. A writer never stops a run: what the disk
refuses is counted and said once.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricWriter(Protocol):
    """Somewhere scalars go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step."""
        ...

    def close(self) -> None:
        """Writes what is still buffered."""
        ...


class JsonlWriter:
    """One JSON object per line; a restored run continues after the restored step.

    Args:
        path: file, local or ``gs://`` (an object store cannot append: the file is written again).
        resume_step: lines of later steps were never part of the restored run and are dropped.
    """

    def __init__(self, path: str, resume_step: int = 0):
        self._path = epath.Path(path)
        self._remote = "://" in str(path)
        self._lines: list[str] = []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= resume_step]
            if self._remote:
                self._lines = kept
            else:
                # Atomic: a kill in between leaves the old file or the new one.
                new = pathlib.Path(f"{path}.new")
                new.write_text("".join(line + "\n" for line in kept))
                new.replace(path)
        self._file = None if self._remote else open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; non-finite values become strings, so that every line is valid JSON."""
        safe = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        line = json.dumps({"step": step, **safe})
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()
        else:
            self._lines.append(line)
            self._path.write_text("\n".join(self._lines) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line that a killed run left


class TensorBoardWriter:
    """TensorBoard event files through tensorboardX (the ``tensorboard`` extra)."""

    def __init__(self, folder: str, resume_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "train.tensorboard needs tensorboardX: pip install 'internvl-jax[tensorboard]'."
            ) from error
        # purge_step makes TensorBoard forget points of a run that went on after the checkpoint.
        self._writer = SummaryWriter(folder, purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases (the ``wandb`` extra); the run's id is kept beside the metrics."""

    def __init__(self, project: str, workdir: str, config: Mapping[str, Any], resume_step: int = 0):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("train.wandb needs wandb: pip install 'internvl-jax[wandb]'.") from error
        marker = epath.Path(workdir) / "wandb_id.txt"
        run_id = marker.read_text() if resume_step and marker.exists() else wandb.util.generate_id()
        marker.write_text(run_id)
        resume = {"resume_from": f"{run_id}?_step={resume_step}"} if resume_step else {"id": run_id}
        self._run = wandb.init(project=project, config=dict(config), **resume)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Writers:
    """Several writers as one; a failing one is reported once and the run goes on."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)
        self.failures = 0

    def _each(self, call: Callable[[MetricWriter], None]) -> None:
        for writer in self._writers:
            try:
                call(writer)
            except Exception as error:
                if not self.failures:
                    log.error(
                        f"{type(writer).__name__} cannot write ({error}); the run goes on, later "
                        "failures are only counted."
                    )
                self.failures += 1

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the values to every writer."""
        self._each(lambda writer: writer.write(step, values))

    def close(self) -> None:
        """Closes every writer."""
        self._each(lambda writer: writer.close())


def open_writers(
    workdir: str,
    *,
    resume_step: int = 0,
    tensorboard: bool = False,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
) -> Writers:
    """The writers of a run; on all processes but the first, none.

    Args:
        workdir: folder of the run.
        resume_step: the restored step, 0 for a new run.
        tensorboard: write event files too.
        wandb: project name, empty for none.
        config: settings to show beside the run.

    Raises:
        ValueError: an extra that is not installed.
    """
    if jax.process_index():
        return Writers([])
    writers: list[MetricWriter] = [JsonlWriter(f"{workdir}/{FILE}", resume_step)]
    if tensorboard:
        writers.append(TensorBoardWriter(f"{workdir}/tensorboard", resume_step))
    if wandb:
        writers.append(WandbWriter(wandb, workdir, config or {}, resume_step))
    return Writers(writers)
