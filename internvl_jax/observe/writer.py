"""Where metrics go: a JSONL file always, TensorBoard and Weights & Biases where wanted.

clu's writers import TensorFlow, so they are not used. A resumed run continues every series from its
restored step without repeated points. Nothing here can end a run: a full disk or a lost connection
is counted and said once.
"""

from __future__ import annotations

import collections
import importlib
import json
import logging
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
_HELD_BACK = 10_000  # lines kept in memory while the disk takes none
_UPLOAD = 30.0  # seconds between copies of the file to an object store
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@runtime_checkable
class MetricWriter(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of one step: anything ``float()`` takes, by name."""
        ...

    def text(self, step: int, name: str, value: str) -> None:
        """Writes a text of one step, such as a configuration or a sample."""
        ...

    def images(self, step: int, name: str, values: Any) -> None:
        """Writes pictures [N, H, W, 3] uint8 of one step."""
        ...

    def flush(self) -> None:
        """Brings what was written to its place."""
        ...

    def close(self) -> None:
        """Flushes and releases."""
        ...


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line that a killed run left


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Reads metrics back, without the half line that a killed run may have left.

    Args:
        path: file written by `JsonlWriter`.

    Yields:
        Records with ``step``; numbers that were not finite are floats again.
    """
    for line in epath.Path(path).read_bytes().splitlines(keepends=True):
        if _step(line) < math.inf:
            record = json.loads(line)
            yield {k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


class JsonlWriter:
    """One JSON object per line; a restored run continues after the restored step.

    Numbers that are not finite become strings, so that every line is valid JSON. A line that the
    disk doesn't take is kept and tried again with the next one.

    Args:
        path: file, local or ``gs://`` (an object store cannot append: a local file is copied there
            now and then, and at every flush).
        resume_step: lines of later steps were never part of the restored run and are dropped; 0
            for a new run.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0):
        self._target = epath.Path(path)
        self._remote = "://" in os.fspath(path)
        self._path = pathlib.Path(path)
        self._resume_step = resume_step
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=_HELD_BACK)
        self._file: int | None = None
        self._copied = 0.0

    def _open(self) -> int:
        if self._remote:
            self._path = pathlib.Path(tempfile.mkdtemp(prefix="metrics-")) / FILE
        self._target.parent.mkdir(parents=True, exist_ok=True)
        if self._target.exists():
            before = self._target.read_bytes()
            lines = before.splitlines(keepends=True)
            kept = b"".join(line for line in lines if _step(line) <= self._resume_step)
            if self._remote:
                self._path.write_bytes(kept)
            elif kept != before:
                # Atomic: a kill in between leaves the old file or the new one.
                new = self._path.with_name(f"{self._path.name}.new")
                new.write_bytes(kept)
                new.replace(self._path)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._drain()
        if self._remote and time.monotonic() - self._copied > _UPLOAD:
            self._copy()

    def _drain(self) -> int:
        if self._file is None:
            self._file = self._open()
        while self._waiting:
            line, size = self._waiting[0], os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError("the disk is full")
            except OSError:
                os.ftruncate(self._file, size)  # no half line
                raise
            self._waiting.popleft()
        return self._file

    def _copy(self) -> None:
        self._copied = time.monotonic()
        self._target.write_bytes(self._path.read_bytes())

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line."""
        plain = {name: float(value) for name, value in values.items()}
        safe = {name: x if math.isfinite(x) else str(x) for name, x in plain.items()}
        self._append({"step": int(step), **safe})

    def text(self, step: int, name: str, value: str) -> None:
        """Appends a line."""
        self._append({"step": int(step), name: value})

    def images(self, step: int, name: str, values: Any) -> None:
        """Pictures have no place here."""

    def flush(self) -> None:
        """Brings the lines to the disk, or to the object store."""
        os.fsync(self._drain())
        if self._remote:
            self._copy()

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self.flush()
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None


class TensorBoardWriter:
    """TensorBoard event files through tensorboardX (the ``tensorboard`` extra).

    Args:
        folder: where event files go.
        resume_step: the restored step, 0 for a new run; TensorBoard hides points after it that an
            earlier process wrote.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, folder: str, resume_step: int = 0):
        board = _need("tensorboardX", "tensorboard")
        # Always: a new run in an old folder hides the old run's points as well.
        self._writer = board.SummaryWriter(folder, purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), step)

    def text(self, step: int, name: str, value: str) -> None:
        """Adds a text."""
        self._writer.add_text(name, value, step)

    def images(self, step: int, name: str, values: Any) -> None:
        """Adds pictures in a grid."""
        self._writer.add_images(name, values, step, dataformats="NHWC")

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases (the ``wandb`` extra); the run's id is kept beside the metrics.

    Args:
        project: W&B project.
        workdir: folder of the run.
        config: settings to show beside the run.
        resume_step: the restored step, 0 for a new run. The W&B run is rewound to it; where the
            service can't (offline, for example), points it already has are not sent again.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, project: str, workdir: str, config: Mapping[str, Any], resume_step: int = 0):
        self._wandb = _need("wandb", "wandb")
        marker = epath.Path(workdir) / "wandb_id.txt"
        local = tempfile.gettempdir() if "://" in workdir else workdir
        settings = {"project": project, "config": dict(config), "dir": local}
        self._known = 0
        if not (resume_step and marker.exists()):
            run_id = self._wandb.util.generate_id()
            self._run = self._wandb.init(id=run_id, **settings)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(run_id)
            return
        run_id = marker.read_text().strip()
        try:
            self._run = self._wandb.init(resume_from=f"{run_id}?_step={resume_step}", **settings)
        except Exception as error:
            log.warning(f"the W&B run {run_id} could not be rewound ({error}); it is continued.")
            self._run = self._wandb.init(id=run_id, resume="allow", **settings)
            self._known = int(self._run.step or 0)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._known:
            self._run.log(values, step=step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs one step."""
        self._log(step, {name: float(value) for name, value in values.items()})

    def text(self, step: int, name: str, value: str) -> None:
        """Logs a text as a table cell, where markup in it is not interpreted."""
        self._log(step, {name: self._wandb.Table(columns=[name], data=[[value]])})

    def images(self, step: int, name: str, values: Any) -> None:
        """Logs pictures."""
        self._log(step, {name: [self._wandb.Image(value) for value in values]})

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Writers:
    """Several writers as one; a failing one is reported once and the run goes on.

    Args:
        writers: where everything goes; none is a valid choice.

    Attributes:
        failures: how many calls failed, by kind of writer.
    """

    def __init__(self, writers: Sequence[MetricWriter] = ()):
        self._writers = list(writers)
        self.failures: collections.Counter[str] = collections.Counter()

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in self._writers:
            kind = type(writer).__name__
            try:
                getattr(writer, method)(*arguments)
            except Exception as error:  # metrics are not worth a run
                if not self.failures[kind]:
                    log.error(
                        f"{kind} cannot write ({error}); the run goes on, later failures are only "
                        "counted."
                    )
                self.failures[kind] += 1

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands the numbers to every writer."""
        self._each("write", step, values)

    def text(self, step: int, name: str, value: str) -> None:
        """Hands a text to every writer."""
        self._each("text", step, name, value)

    def images(self, step: int, name: str, values: Any) -> None:
        """Hands pictures to every writer."""
        self._each("images", step, name, values)

    def flush(self) -> None:
        """Flushes every writer."""
        self._each("flush")

    def close(self) -> None:
        """Closes every writer."""
        self._each("close")


def _need(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"train.{extra} needs {module}: pip install 'internvl-jax[{extra}]', or switch it off."
        ) from error


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
        workdir: folder of the run, local or ``gs://``.
        resume_step: the restored step, 0 for a new run.
        tensorboard: write event files too.
        wandb: project name, empty for none.
        config: settings to show beside the run.

    Returns:
        The writers as one. One that can't be opened for another reason than a missing extra (no
        network, no space) is left out with a sentence in the log.

    Raises:
        ValueError: an extra that is not installed.
    """
    import jax  # here: reading metrics back needs no jax

    if jax.process_index():
        return Writers()
    base = workdir.rstrip("/")
    writers: list[MetricWriter] = [JsonlWriter(f"{base}/{FILE}", resume_step)]
    wanted = []
    if tensorboard:
        wanted.append(lambda: TensorBoardWriter(f"{base}/tensorboard", resume_step))
    if wandb:
        wanted.append(lambda: WandbWriter(wandb, base, config or {}, resume_step))
    for make in wanted:
        try:
            writers.append(make())
        except ValueError:
            raise
        except Exception as error:
            log.error(f"a metric writer could not be opened ({error}); the run goes on without it.")
    return Writers(writers)
