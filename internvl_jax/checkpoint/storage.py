"""What one saved step looks like on disk.

    <workdir>/checkpoints/<step>/state/     the arrays (Orbax, zarr3 inside OCDBT, uncompressed)
                                 meta/      JSON: shape, dtype, fingerprint of every leaf; our meta
                                 commit_success.txt      written last

How arrays come back from it is `reading`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from internvl_jax import tree as trees
from internvl_jax.checkpoint.integrity import describe
from internvl_jax.checkpoint.links import COMMITTED, Place

DIRECTORY = "checkpoints"
_SMALLEST_CHUNK = 1 << 20  # bytes: below, reading a chunk costs more than its data


class CheckpointError(RuntimeError):
    """A checkpoint is missing or damaged."""


class MissingBase(CheckpointError):
    """A checkpoint is intact, but another one that stores some of its leaves is gone."""


class CheckpointMismatch(ValueError):
    """An intact checkpoint holds something else than the configuration asks for."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What the meta file says of one array: enough to refuse a wrong one before reading it.

    Attributes:
        shape, dtype, fingerprint: of the array.
        at: the other checkpoint that stores it, maybe in a wider dtype; None where this one does.
    """

    shape: tuple[int, ...]
    dtype: str
    fingerprint: str
    at: Place | None = None


@dataclasses.dataclass(frozen=True)
class Meta:
    """The JSON side of a saved step.

    Attributes:
        step: training step the state belongs to (that many updates are done).
        leaves: every array of the state by path.
        user: what the caller stored, JSON values.
        metrics: metric values by name at this step.
    """

    step: int
    leaves: dict[str, Leaf]
    user: dict[str, Any]
    metrics: dict[str, float]


def handler() -> ocp.PyTreeCheckpointHandler:
    """The array format: zarr3 without compression, which is fastest and lets a slice be read.

    Returns:
        An Orbax handler for the ``state`` item.
    """
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


def save_args(
    state: Mapping[str, Any], meta: Meta, stacked: Callable[[str], bool]
) -> ocp.args.Composite:
    """Arguments for Orbax that write one step.

    Args:
        state: arrays by path.
        meta: what to write beside them.
        stacked: tells from its path whether a leaf has a leading layer axis; such leaves are
            stored one chunk per layer, so that a single layer can be read.

    Returns:
        ``ocp.args.Composite`` with the items ``state`` and ``meta``.
    """

    def chunks(path: str, x: Any) -> ocp.SaveArgs:
        layer = x.nbytes // x.shape[0] if x.ndim > 1 else 0
        if layer < _SMALLEST_CHUNK or not stacked(path):
            return ocp.SaveArgs()
        # shard_axes too, or Orbax splits the largest axis instead of the layers.
        return ocp.SaveArgs(chunk_byte_size=layer, shard_axes=(0,))

    # Orbax refuses empty arrays.
    stored = {path: x for path, x in state.items() if x.size and not meta.leaves[path].at}
    nested = trees.unflatten(stored)
    how = trees.unflatten({path: chunks(path, x) for path, x in stored.items()})
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(nested, save_args=how),
        meta=ocp.args.JsonSave(sealed(meta)),
    )


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def sealed(meta: Meta) -> dict[str, Any]:
    """What the meta file of a step holds.

    Args:
        meta: its content.

    Returns:
        JSON values, with a digest that `load_meta` checks.
    """
    document = dataclasses.asdict(meta)
    leaves = document["leaves"].items()
    leaves = {p: {k: v for k, v in leaf.items() if v is not None} for p, leaf in leaves}
    plain = json.loads(json.dumps({**document, "leaves": leaves}))  # as it will be read
    return {"format": 1, "sha256": _digest(plain), "content": plain}


def load_meta(step_dir: epath.PathLike) -> Meta:
    """Read and check the JSON side of a saved step.

    Args:
        step_dir: directory of the step.

    Returns:
        Its meta.

    Raises:
        CheckpointError: it is missing, unreadable or altered.
    """
    step_dir = absolute(step_dir)
    try:
        document = json.loads((step_dir / "meta" / "metadata").read_text())
        content = document["content"]
        intact = document["sha256"] == _digest(content)
    except Exception as error:
        raise CheckpointError(
            f"the meta file of {step_dir} can't be read ({brief(error)})."
        ) from error
    if not intact:
        raise CheckpointError(f"the meta file of {step_dir} was altered after it was written.")
    leaves = {
        path: Leaf(
            tuple(leaf["shape"]),
            leaf["dtype"],
            leaf["fingerprint"],
            Place(**leaf["at"]).found_from(step_dir) if "at" in leaf else None,
        )
        for path, leaf in content["leaves"].items()
    }
    return Meta(content["step"], leaves, content["user"], content["metrics"])


def absolute(path: epath.PathLike) -> epath.Path:
    """A path as the libraries below need it: local ones absolute, addresses as they are.

    Args:
        path: local or ``gs://``, as a user writes it.

    Returns:
        The path.
    """
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def committed_steps(directory: epath.PathLike) -> list[int]:
    """Steps in a directory whose writing was finished.

    Args:
        directory: the directory that holds the step directories.

    Returns:
        The steps, ascending; empty where the directory doesn't exist.
    """
    directory = absolute(directory)
    if not directory.exists():
        return []
    found = [p for p in directory.iterdir() if p.name.isdigit() and (p / COMMITTED).exists()]
    return sorted(int(p.name) for p in found)


def find_step(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """Directory of a saved step, from whatever a user points at.

    Args:
        path: a work directory, its ``checkpoints`` directory, or one step's directory.
        step: which step; the newest finished one by default.

    Returns:
        The step's directory.

    Raises:
        CheckpointError: there is no such step.
    """
    path = absolute(path)
    if step is None and path.name.isdigit() and (path / COMMITTED).exists():
        return path
    for directory in (path / DIRECTORY, path):
        steps = committed_steps(directory)
        if steps and step is None:
            return directory / str(steps[-1])
        if step in steps:
            return directory / str(step)
        if steps:
            raise CheckpointError(
                f"{directory} has no finished checkpoint of step {step}; it has "
                f"{', '.join(map(str, steps))}."
            )
    raise CheckpointError(f"there is no finished checkpoint in {path}.")


def compare(
    meta: Meta, wanted: Mapping[str, Any], where: Any, *, partial: bool = False, cast: bool = False
) -> None:
    """Refuse, before any array is read, a checkpoint that doesn't hold what is asked for.

    Args:
        meta: of the checkpoint.
        wanted: ``jax.ShapeDtypeStruct`` by path.
        where: the checkpoint's name for the sentence.
        partial: the checkpoint may hold more than is asked for.
        cast: dtypes may differ (arrays are then converted after their check).

    Raises:
        CheckpointMismatch: names the leaf, what was expected and what was found.
    """
    advice = "use the configuration it was written with, or another work directory"
    missing = [path for path in wanted if path not in meta.leaves]
    if missing:
        raise CheckpointMismatch(
            f"{where} doesn't hold {trees.some(missing)}, which the model expects; {advice}."
        )
    extra = [path for path in meta.leaves if path not in wanted]
    if extra and not partial:
        raise CheckpointMismatch(
            f"{where} holds {trees.some(extra)}, which the model doesn't have; {advice}."
        )
    for path, target in wanted.items():
        leaf = meta.leaves[path]
        if tuple(target.shape) != leaf.shape:
            raise CheckpointMismatch(
                f"{where} holds {path} as {describe(leaf)} and the model expects "
                f"{describe(target)}; {advice}."
            )
        if np.dtype(target.dtype) != np.dtype(leaf.dtype) and not cast:
            raise CheckpointMismatch(
                f"{where} holds {path} as {describe(leaf)} and the model expects "
                f"{describe(target)}; say cast=True to convert it, or {advice}."
            )


def agree(problem: Exception | None, doing: str) -> None:
    """Let all processes fail together: raises everywhere when one process has a problem.

    Args:
        problem: what went wrong here, or None.
        doing: what was being done, for the sentence of the processes that were fine.

    Raises:
        CheckpointError: on every process, when at least one had a problem.
    """
    if jax.process_count() > 1:
        bad = np.asarray(multihost_utils.process_allgather(np.array(problem is not None)))
        if bad.any() and problem is None:
            raise CheckpointError(f"{doing} failed on process {int(np.argmax(bad))}.")
    if isinstance(problem, CheckpointError):
        raise problem
    if problem is not None:
        raise CheckpointError(f"{doing} failed ({brief(problem)}).") from problem


def brief(error: Exception) -> str:
    """An exception's text on one line, as part of a sentence.

    Args:
        error: the exception.

    Returns:
        At most 500 characters without line breaks.
    """
    return " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__


def array_spec(step_dir: str, path: str) -> dict[str, Any]:
    """Where TensorStore finds an array.

    Args:
        step_dir: directory of the step that stores it, in full.
        path: its name there.

    Returns:
        A spec that says no more than that.
    """
    base = f"{step_dir}/state/"
    base = base if "://" in base else f"file://{base}"
    inside = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
    return {"driver": "zarr3", "kvstore": inside}
