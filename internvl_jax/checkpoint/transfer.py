"""Parameters from elsewhere: rename, resize, account for every leaf, refuse surprises.

A stage starts from the parameters of the one before it, a model from pretrained weights. Which
leaf goes where is decided on shapes alone, before anything is read: each leaf of the model is
loaded, resized or new, each leaf of the source is used or dropped, and what was not announced
raises.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

from internvl_jax import tree as trees
from internvl_jax.checkpoint import reading, storage
from internvl_jax.checkpoint.integrity import describe
from internvl_jax.checkpoint.links import Place

Resize = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Somewhere parameters come from."""

    @property
    def name(self) -> str:
        """How sentences call it."""
        ...

    def leaves(self) -> Mapping[str, Any]:
        """What there is: anything with ``shape`` and ``dtype``, by path."""
        ...

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Read some leaves: jax arrays where a sharding is given, numpy arrays elsewhere."""
        ...


class CheckpointSource:
    """The parameters in a checkpoint of another run, without its optimizer state."""

    def __init__(
        self,
        path: epath.PathLike,
        step: int | None = None,
        roots: Sequence[str] = ("params", "frozen"),
    ) -> None:
        """Name the checkpoint; it is opened when it is first needed (a resumed run never does).

        Args:
            path: a work directory, its ``checkpoints`` directory, or one step's directory.
            step: which step; the newest finished one by default.
            roots: parts of the state that hold parameters, laid over each other: a leaf is taken
                from the first part that has it, so ``("ema", "params", "frozen")`` prefers
                averages.
        """
        self._path, self._step, self._roots = path, step, tuple(roots)

    @functools.cached_property
    def _step_dir(self) -> epath.Path:
        return storage.find_step(self._path, self._step)

    @functools.cached_property
    def _meta(self) -> storage.Meta:
        return storage.load_meta(self._step_dir)

    @functools.cached_property
    def _full(self) -> dict[str, str]:
        full: dict[str, str] = {}
        for root in self._roots:
            for path in self._meta.leaves:
                if path.startswith(f"{root}/"):
                    full.setdefault(path[len(root) + 1 :], path)
        if not full:
            raise storage.CheckpointError(
                f"{self.name} has no part named {' or '.join(self._roots)} to take parameters from."
            )
        return full

    @property
    def name(self) -> str:
        """The path given, or the directory of the step once it is open."""
        return str(self.__dict__.get("_step_dir", self._path))

    def leaves(self) -> dict[str, storage.Leaf]:
        """Its parameters.

        Returns:
            Shape, dtype and where it is stored by path, without the name of the part.

        Raises:
            CheckpointError: there is no such checkpoint, or it has none of the parts.
        """
        here = str(self._step_dir)
        found = {path: (full, self._meta.leaves[full]) for path, full in self._full.items()}
        return {
            path: dataclasses.replace(leaf, at=leaf.at or Place(here, full))
            for path, (full, leaf) in found.items()
        }

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Read and check some of them.

        Args:
            wanted: shapes, dtypes and shardings by path.

        Returns:
            Arrays by path.

        Raises:
            CheckpointError: a leaf is damaged.
        """
        renamed = {self._full[path]: target for path, target in wanted.items()}
        arrays = reading.read_arrays(self._step_dir, self._meta, renamed)
        return {path: arrays[self._full[path]] for path in wanted}


class ArraySource:
    """Parameters that are in host memory already."""

    def __init__(self, params: Any, name: str = "given arrays") -> None:
        """Take a tree of arrays.

        Args:
            params: pytree of numpy arrays.
            name: how sentences call it.
        """
        self._name, self._arrays = name, trees.flatten(params)

    @property
    def name(self) -> str:
        """How sentences call it."""
        return self._name

    def leaves(self) -> dict[str, Any]:
        """Its parameters.

        Returns:
            Arrays by path.
        """
        return self._arrays

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
        """Place some of them.

        Args:
            wanted: shapes, dtypes and shardings by path.

        Returns:
            Arrays by path.
        """
        return {path: place(self._arrays[path], target) for path, target in wanted.items()}


def place(array: Any, target: jax.ShapeDtypeStruct) -> Any:
    """Convert a host array and put it where it belongs, each process only its own shards.

    Args:
        array: numpy array of the target's shape, the same on every process.
        target: dtype and sharding; without a sharding the result is a numpy array.

    Returns:
        The array.
    """
    array = np.asarray(array).astype(target.dtype)
    if target.sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, target.sharding, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What is announced: everything else is a surprise.

    Attributes:
        source: where parameters come from.
        rename: pairs (old prefix, new prefix) of whole path components; the first that fits a
            source path is applied. An empty prefix stands for the root.
        new_ok: regular expressions; target paths matching one in full may be missing in the source.
        dropped_ok: regular expressions; source paths matching one in full may be left unused.
        resize: pairs (regular expression of target paths, function (array, new shape) -> array)
            for leaves whose shape changes, such as position tables.
        cast: dtypes may change, for example to let a frozen tower rest in bfloat16.
    """

    source: Source
    rename: tuple[tuple[str, str], ...] = ()
    new_ok: tuple[str, ...] = ()
    dropped_ok: tuple[str, ...] = ()
    resize: tuple[tuple[str, Resize], ...] = ()
    cast: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """Where every leaf of the model came from, and what became of the source's.

    Attributes:
        source: name of the source.
        loaded: source path by target path, taken as they are (or with another dtype).
        resized: source path by target path, shape changed.
        new: target paths that keep their initial values.
        dropped: source paths that were not used.
        notes: what to say about a leaf, by target or source path.
        sizes: number of elements by target path.
    """

    source: str
    loaded: dict[str, str]
    resized: dict[str, str]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: dict[str, str]
    sizes: dict[str, int]

    def summary(self) -> str:
        """One line.

        Returns:
            For example ``loaded 61 (12,345 values), resized 1, new 4, dropped 2 from runs/a``.
        """
        values = sum(self.sizes[path] for path in self.loaded)
        return (
            f"loaded {len(self.loaded)} ({values:,} values), resized {len(self.resized)}, "
            f"new {len(self.new)}, dropped {len(self.dropped)} from {self.source}"
        )

    def table(self) -> str:
        """One line per leaf that is not simply loaded, one per top-level part for those that are.

        Returns:
            Text of several lines, the summary first.
        """
        parts: dict[str, list[int]] = {}
        for path in self.loaded:
            count = parts.setdefault(path.split("/")[0] + "/…", [0, 0])
            count[0] += 1
            count[1] += self.sizes[path]
        rows = [
            ("loaded", part, f"{leaves} leaves, {values:,} values")
            for part, (leaves, values) in parts.items()
        ]
        rows += [("loaded", path, self.notes[path]) for path in self.loaded if path in self.notes]
        for kind in ("resized", "new", "dropped"):
            rows += [(kind, path, self.notes.get(path, "")) for path in getattr(self, kind)]
        width = max((len(path) for _, path, _ in rows), default=0)
        lines = [f"  {kind:8}{path:{width}}  {note}".rstrip() for kind, path, note in rows]
        return "\n".join([self.summary(), *lines])


def _renamed(path: str, rules: Iterable[tuple[str, str]], used: set[tuple[str, str]]) -> str:
    for rule in rules:
        old, new = rule
        if not old or path == old or path.startswith(f"{old}/"):
            used.add(rule)
            rest = path[len(old) :].lstrip("/")
            return "/".join(part for part in (new, rest) if part)
    return path


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _closest(path: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(path, list(others), n=1, cutoff=0.5)
    return f" (did you mean to rename {near[0]}?)" if near else ""


def plan(target: Mapping[str, Any], transfer: Transfer) -> Report:
    """Decide from shapes alone where every leaf comes from.

    Args:
        target: ``jax.ShapeDtypeStruct`` of the model's parameters by path.
        transfer: source, rules and what is announced.

    Returns:
        The report.

    Raises:
        CheckpointMismatch: a leaf is new, dropped, of another shape or dtype without having been
            announced, a rule fits nothing, or two leaves get the same name.
    """
    source, name = transfer.source.leaves(), transfer.source.name
    used: set[tuple[str, str]] = set()
    origin: dict[str, str] = {}
    for path in source:
        new = _renamed(path, transfer.rename, used)
        if new in origin:
            raise storage.CheckpointMismatch(
                f"{origin[new]} and {path} of {name} are both renamed to {new}; change the rules."
            )
        origin[new] = path
    idle = [rule for rule in transfer.rename if rule not in used]
    if idle:
        raise storage.CheckpointMismatch(
            f"the rename rule {idle[0][0]} -> {idle[0][1]} fits no parameter of {name}; its first "
            f"are {trees.some(source)}."
        )
    new = [path for path in target if path not in origin]
    dropped = [path for renamed, path in origin.items() if renamed not in target]
    surprising = [path for path in new if not _matches(path, transfer.new_ok)]
    if surprising:
        shape = tuple(target[surprising[0]].shape)
        alike = [path for path in dropped if tuple(source[path].shape) == shape]
        hint = _closest(surprising[0], alike)
        raise storage.CheckpointMismatch(
            f"{name} doesn't hold {trees.some(surprising)}{hint}; rename parameters, or list them "
            "in new_ok to keep their initial values."
        )
    surprising = [path for path in dropped if not _matches(path, transfer.dropped_ok)]
    if surprising:
        raise storage.CheckpointMismatch(
            f"the model has no place for {trees.some(surprising)} of {name}; rename them, or list "
            "them in dropped_ok."
        )
    loaded: dict[str, str] = {}
    resized: dict[str, str] = {}
    notes: dict[str, str] = {path: describe(target[path]) for path in new}
    notes |= {path: describe(source[path]) for path in dropped}
    for path, wanted in target.items():
        if path not in origin:
            continue
        stored = source[origin[path]]
        change = f"{describe(stored)} -> {describe(wanted)}"
        if np.dtype(stored.dtype) != np.dtype(wanted.dtype):
            if not transfer.cast:
                raise storage.CheckpointMismatch(
                    f"{path} would change from {change} coming from {name}; say cast=True to "
                    "convert it."
                )
            notes[path] = change
        if tuple(stored.shape) == tuple(wanted.shape):
            loaded[path] = origin[path]
            continue
        if not _matches(path, (pattern for pattern, _ in transfer.resize)):
            raise storage.CheckpointMismatch(
                f"{path} is {change} coming from {name}; use the same sizes, or give a resize "
                "rule for it."
            )
        resized[path], notes[path] = origin[path], change
    sizes = {path: math.prod(x.shape) for path, x in target.items()}
    return Report(name, loaded, resized, tuple(new), tuple(dropped), notes, sizes)


def load(target: Mapping[str, Any], transfer: Transfer) -> tuple[dict[str, Any], Report]:
    """Load what the source has; new leaves are left to the caller.

    Args:
        target: ``jax.ShapeDtypeStruct`` with sharding by path.
        transfer: source, rules and what is announced.

    Returns:
        Arrays by target path (all but the new ones), and the report.

    Raises:
        CheckpointMismatch: a surprise, see :func:`plan`.
        CheckpointError: the source is damaged.
    """
    report = plan(target, transfer)
    stored = transfer.source.leaves()
    arrays = transfer.source.read({old: target[path] for path, old in report.loaded.items()})
    result = {path: arrays[old] for path, old in report.loaded.items()}
    # Tables that change shape are small: every process reads them whole and resizes on the host.
    whole = {
        old: jax.ShapeDtypeStruct(tuple(stored[old].shape), np.dtype(stored[old].dtype))
        for old in report.resized.values()
    }
    tables = transfer.source.read(whole) if whole else {}
    for path, old in report.resized.items():
        resize = next(
            function for pattern, function in transfer.resize if _matches(path, [pattern])
        )
        table = np.asarray(resize(tables[old], tuple(target[path].shape)))
        if table.shape != tuple(target[path].shape):
            raise storage.CheckpointMismatch(
                f"the resize rule of {path} gave {describe(table)} where {describe(target[path])} "
                "is needed."
            )
        result[path] = place(table, target[path])
    return result, report
