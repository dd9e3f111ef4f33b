"""Write a step without a device, row by row: how converted weights become a checkpoint.

The step has the layout that a trainer's has (`storage`), stacked leaves one chunk per layer, so
training, evaluation, export and Orbax itself read it like any other. What is in memory at a time is
a row.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from internvl_jax.checkpoint import storage
from internvl_jax.checkpoint.integrity import HostFingerprint
from internvl_jax.checkpoint.storage import CheckpointError, Leaf, Meta


class StepWriter:
    """One step that comes into being leaf by leaf; until `commit` no reader takes it for one."""

    def __init__(self, workdir: epath.PathLike, step: int = 0, *, overwrite: bool = False):
        """Makes the step's directory; what an interrupted writer left there is removed.

        Args:
            workdir: the work directory, local or in a bucket.
            step: its number, unless something is replaced.
            overwrite: replace what the work directory holds. The new step follows the old ones,
                which go only once it is finished.

        Raises:
            CheckpointError: the work directory holds a finished checkpoint.
        """
        self.workdir = storage.absolute(workdir)
        directory = self.workdir / storage.DIRECTORY
        finished = storage.committed_steps(directory)
        if finished and not overwrite:
            raise CheckpointError(
                f"{self.workdir} holds a checkpoint of step {finished[-1]}: choose another folder,"
                " or ask to overwrite it."
            )
        step = finished[-1] + 1 if finished else step
        self.directory = directory / str(step)
        self._replaced = [directory / str(old) for old in finished]
        _remove(self.directory)
        # What `abandon` removes: the topmost directory that was not there before.
        places = (self.workdir, directory, self.directory)
        self._made: epath.Path | None = next(place for place in places if not place.exists())
        (self.directory / "state").mkdir(parents=True, exist_ok=True)
        (self.directory / "meta").mkdir(parents=True, exist_ok=True)
        self._step = step
        self._leaves: dict[str, Leaf] = {}
        self._began = time.time_ns()
        self._sums = ThreadPoolExecutor(1)  # in order, beside the writing
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})

    def leaf(
        self, path: str, shape: tuple[int, ...], dtype: Any, rows: Iterable[np.ndarray]
    ) -> None:
        """Writes one array.

        Args:
            path: its place in the state, for example ``params/vision/pos``.
            shape: of the whole array.
            dtype: of the whole array.
            rows: ``leaf[0]``, ``leaf[1]``, … of a stacked leaf, or the whole array once.

        Raises:
            CheckpointError: it cannot be written, where the disk is full for example.
        """
        dtype = np.dtype(dtype)
        store, host, row_count = None, HostFingerprint(), 0
        pending: list[Any] = []
        sums: list[Future[None]] = []
        for index, row in enumerate(rows):
            stacked = row.shape != shape
            if store is None and math.prod(shape):
                store = self._open(path, shape, dtype, (1, *shape[1:]) if stacked else shape)
            row = np.asarray(row, dtype, order="C")
            sums.append(self._sums.submit(host.update, row))
            if store is not None:
                target = store[index] if stacked else store
                pending.append(target.write(row, can_reference_source_data_indefinitely=True))
            while len(pending) > 1:
                self._finish(path, pending.pop(0))
                sums.pop(0).result()
            row_count += row.size
        for write in pending:
            self._finish(path, write)
        for future in sums:
            future.result()
        if row_count != math.prod(shape):
            raise CheckpointError(
                f"leaf {path} was given {row_count} of its values; this is a bug."
            )
        self._leaves[path] = Leaf(shape, dtype.name, host.text())

    def _open(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]
    ) -> tensorstore.TensorStore:
        spec = storage.array_spec(str(self.directory), path) | {
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
        }
        return self._finish(path, tensorstore.open(spec, create=True, context=self._context))

    def _finish(self, path: str, doing: Any) -> Any:
        try:
            return doing.result()
        except Exception as error:  # TensorStore raises several types
            raise CheckpointError(
                f"leaf {path} can't be written to {self.directory} ({storage.brief(error)})."
            ) from error

    def commit(self, user: dict[str, Any]) -> None:
        """Writes what describes the arrays, and last the mark that makes the step count.

        Args:
            user: what a run stores beside its state, JSON values (``stage``, ``experiment`` …).
        """
        self._sums.shutdown()
        tree = {
            str(tuple(path.split("/"))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path.split("/")],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for path, leaf in self._leaves.items()
            if math.prod(leaf.shape)
        }
        described = dict(tree_metadata=tree, use_ocdbt=True, use_zarr3=True)
        described |= dict(store_array_data_equal_to_fill_value=True, custom_metadata=None)
        self._json("state/_METADATA", described)
        meta = Meta(self._step, self._leaves, user, {})
        self._json("meta/metadata", storage.sealed(meta))
        handlers = "orbax.checkpoint._src.handlers"
        self._json(
            "_CHECKPOINT_METADATA",
            {
                "item_handlers": {
                    "meta": f"{handlers}.json_checkpoint_handler.JsonCheckpointHandler",
                    "state": f"{handlers}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
                },
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": self._began,
                "commit_timestamp_nsecs": time.time_ns(),
                "custom_metadata": {},
            },
        )
        for place in ("state/", "meta/", ""):
            mark = self.directory / f"{place}{storage.COMMITTED}"
            mark.write_text(f"Checkpoint commit was successful to {mark.parent}")
        self._made = None
        for old in self._replaced:
            _remove(old)

    def _json(self, name: str, content: Any) -> None:
        (self.directory / name).write_text(json.dumps(content))

    def abandon(self) -> None:
        """Removes what was written so far; a step that is finished stays."""
        self._sums.shutdown(cancel_futures=True)
        if self._made is None:
            return
        if "://" in str(self._made):
            self._made.rmtree(missing_ok=True)
        else:
            shutil.rmtree(self._made, ignore_errors=True)


def _remove(step_dir: epath.Path) -> None:
    # The mark goes first: a step that is half deleted must not look finished.
    (step_dir / storage.COMMITTED).unlink(missing_ok=True)
    if step_dir.exists():
        step_dir.rmtree()
