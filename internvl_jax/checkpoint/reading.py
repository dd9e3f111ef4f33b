"""Arrays of a saved step, read back with every leaf checked.

Reading needs no manager, so evaluation, stage hand-over and conversion open a directory that a
trainer is still writing to without disturbing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath

from internvl_jax import tree as trees
from internvl_jax.checkpoint.integrity import fingerprints
from internvl_jax.checkpoint.links import Place, there
from internvl_jax.checkpoint.storage import (
    CheckpointError,
    Leaf,
    Meta,
    MissingBase,
    absolute,
    agree,
    array_spec,
)

_WINDOW = 4 << 30  # bytes read into host memory at a time


def read_arrays(
    step_dir: epath.PathLike, meta: Meta, wanted: Mapping[str, Any]
) -> dict[str, jax.Array | np.ndarray]:
    """Read some leaves of a saved step and compare each with its fingerprint.

    Args:
        step_dir: directory of the step.
        meta: its meta, already compared with ``wanted``.
        wanted: ``jax.ShapeDtypeStruct`` by path; with a sharding the array is made on devices,
            without one it is a numpy array. A dtype that differs from the stored one converts.

    Returns:
        The arrays by path.

    Raises:
        CheckpointError: something can't be read or isn't what was written.
    """
    arrays: dict[str, jax.Array | np.ndarray] = {}
    problem = None
    try:
        for window in _windows(wanted):
            arrays |= _read_window(step_dir, meta, window)
    except Exception as error:  # TensorStore raises several types
        problem = error
    agree(problem, f"reading {step_dir}")
    problem = None
    try:
        _verify(arrays, meta, step_dir)
    except Exception as error:
        problem = error
    agree(problem, f"checking {step_dir}")
    return {path: _convert(arrays.pop(path), target) for path, target in wanted.items()}


def _windows(wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a request so that the host holds a few gigabytes of it at a time."""
    window: dict[str, Any] = {}
    size = 0
    for path, target in wanted.items():
        window[path] = target
        shard = (
            target.shape if target.sharding is None else target.sharding.shard_shape(target.shape)
        )
        size += math.prod(shard) * np.dtype(target.dtype).itemsize * jax.local_device_count()
        if size > _WINDOW:
            yield window
            window, size = {}, 0
    yield window


def _read_window(step_dir: epath.PathLike, meta: Meta, window: Mapping[str, Any]) -> dict[str, Any]:
    """Read in parallel the parts that this process needs, each once, and place them.

    TensorStore and not Orbax does the reading: Orbax leaves callbacks behind when a read fails,
    and this file has to get on after failures.
    """
    stores = open_stores(step_dir, {path: meta.leaves[path] for path in window})
    parts: dict[str, dict[Any, Any]] = {}
    for path, target in window.items():
        indices: list[Any] = [...]
        if target.sharding is not None:
            indices = list(target.sharding.addressable_devices_indices_map(target.shape).values())
        keys = {str(index): index for index in indices}
        parts[path] = {key: stores[path][index].read() for key, index in keys.items()}
    arrays = {}
    for path, target in window.items():
        done = {key: np.asarray(future.result()) for key, future in parts.pop(path).items()}
        if target.sharding is None:
            arrays[path] = done[str(...)]
        else:
            arrays[path] = jax.make_array_from_callback(
                target.shape, target.sharding, lambda index, done=done: done[str(index)]
            )
    return arrays


def open_stores(step_dir: epath.PathLike, leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    """Open stored arrays for reading by slices, wherever they rest.

    Args:
        step_dir: directory of the step.
        leaves: what to open, by path.

    Returns:
        TensorStore objects by path; for empty arrays, which are not stored, a stand-in.

    Raises:
        MissingBase: the checkpoint that stores some of them is gone.
        ValueError: an array can't be opened (as TensorStore puts it).
    """
    here = str(absolute(step_dir))
    places = {path: leaf.at or Place(here, path) for path, leaf in leaves.items()}
    for base in {place.step_dir for place in places.values()} - {here}:
        if not there(base):
            raise MissingBase(
                f"{step_dir} takes the parameters that it did not train from {base}, which is not "
                "there: move that checkpoint back, or use a run that stores its own "
                "(train.frozen_in_checkpoints='stored')."
            )
    context = tensorstore.Context({"file_io_concurrency": {"limit": 128}})
    opened = {}
    for path, leaf in leaves.items():
        if not math.prod(leaf.shape):
            opened[path] = tensorstore.array(np.zeros(leaf.shape, np.dtype(leaf.dtype)))
            continue
        spec = array_spec(places[path].step_dir, places[path].path)
        spec["recheck_cached_data"] = "open"
        opened[path] = tensorstore.open(spec, context=context, open=True, read=True)
    for path, store in opened.items():
        store = store.result() if isinstance(store, tensorstore.Future) else store
        if leaves[path].at and store.dtype.name != leaves[path].dtype:
            store = tensorstore.cast(store, leaves[path].dtype)
        opened[path] = store
    return opened


def _verify(arrays: Mapping[str, Any], meta: Meta, where: Any) -> None:
    found = fingerprints({path: arrays[path] for path in sorted(arrays)})
    wrong = [path for path, text in found.items() if text != meta.leaves[path].fingerprint]
    if wrong:
        place = meta.leaves[wrong[0]].at
        where = where if place is None else f"{place.step_dir}, which {where} takes it from,"
        raise CheckpointError(
            f"{trees.some(wrong)} of {where} is not what was written: its bits changed in storage."
        )


def _convert(x: Any, target: jax.ShapeDtypeStruct) -> Any:
    if x.dtype == target.dtype:
        return x
    if isinstance(x, np.ndarray):
        return x.astype(target.dtype)
    return jax.jit(lambda a: a.astype(target.dtype), out_shardings=target.sharding)(x)
