"""Official PyTorch weights -> our parameters, strictly checked on both sides."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.convert.key_maps import (
    Entry,
    KeyMap,
    ModelConfig,
    definition,
    key_map,
    some,
)
from internvl_jax.convert.shards import Shape, Shard, WeightsError
from internvl_jax.convert.transpose import contiguous
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import stacked
from internvl_jax.tree import flatten, unflatten

__all__ = ["Tensors", "WeightsError", "check", "load", "module", "rows"]

# Buffers that old LLaMA files carry and nothing reads: the rotary frequencies are computed.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")

MAPPED = 256 << 20  # bytes of a pickled file that are read before it is mapped anew


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of official files by name, read one at a time.

    Takes a `.safetensors`, `.bin` or `.pth` file, or a folder of shards. Pickled files are read by
    torch's weights-only loader, so nothing in them is executed.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self._file: dict[str, Any] = {}
        self.shapes: dict[str, Shape] = {}
        for path in _files(self.source):
            opened = Shard(path) if path.suffix == ".safetensors" else _Pickle(path)
            for name, shape in opened.shapes.items():
                if name in self.shapes:
                    raise WeightsError(f"{self.source} holds the tensor {name} twice.")
                self._file[name], self.shapes[name] = opened, shape

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise WeightsError(f"{source} does not exist: give a weight file or a folder of them.")
    indices = [*source.glob("*.safetensors.index.json"), *source.glob("*.bin.index.json")]
    if indices:
        try:
            listed = set(json.loads(indices[0].read_text())["weight_map"].values())
            # A name with a folder in it could point anywhere.
            files = [source / Path(name).name for name in sorted(listed)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(f"{indices[0]} is not an index of weight files.") from None
        for path in files:
            if not path.is_file():
                raise WeightsError(f"{source} lacks {path.name}, which {indices[0].name} lists.")
        return files
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        if files := sorted(source.glob(pattern)):
            return files
    raise WeightsError(f"{source} holds no .safetensors, .bin or .pth file.")


class _Pickle:
    """A pickled file: mapped, and mapped anew now and then, as what was read stays resident."""

    def __init__(self, path: Path):
        self._path, self._resident = path, 0
        self._state = _unpickled(path)
        self.shapes = {n: tuple(t.shape) for n, t in self._state.items()}

    def read(self, name: str) -> np.ndarray:
        import ml_dtypes
        import torch

        tensor = self._state[name].detach().clone()
        self._resident += tensor.nbytes
        if self._resident > MAPPED and zipfile.is_zipfile(self._path):
            self._state, self._resident = _unpickled(self._path), 0
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        try:
            return tensor.numpy()
        except (TypeError, RuntimeError):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(
                f"{name} in {self._path} has the type {kind}, which cannot be read."
            ) from None


def _unpickled(path: Path) -> dict[str, Any]:
    """The tensors of a file, by torch's loader that executes nothing. Raises WeightsError."""
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path} is a pickled file: install the torch extra, or convert it to safetensors."
        ) from None
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped: memory holds them.
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} cannot be read as plain weights: {reason}") from None
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds no table of tensors.")
    return {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}


def shapes(tensors: Mapping[str, Any]) -> Mapping[str, Shape]:
    """Name -> shape, without reading what need not be read."""
    known = getattr(tensors, "shapes", None)
    return {n: tuple(np.shape(t)) for n, t in tensors.items()} if known is None else known


def check(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str | Path) -> None:
    """Compares names and shapes in both directions.

    Args:
        found: what the files hold.
        expected: what the model needs, `KeyMap.shapes`.
        where: the files, for the message.

    Raises:
        WeightsError: one sentence that names what is missing, extra or misshapen.
    """
    missing = [n for n in expected if n not in found]
    extra = [n for n in found if n not in expected and not IGNORED.search(n)]
    wrong = [
        f"{n} (is {list(found[n])}, should be {list(expected[n])})"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    faults: list[str] = []
    for what, names in (("lacks", missing), ("has the unknown", extra), ("misshapes", wrong)):
        if names:
            faults.append(f"{what} {some(names)}")
    if faults:
        raise WeightsError(f"{where} does not fit the model: it {'; it '.join(faults)}.")


def rows(
    keys: KeyMap, path: str, tensors: Mapping[str, np.ndarray], dtype: Any = None
) -> Iterator[np.ndarray]:
    """One of our leaves out of official tensors, each of which is read once.

    Args:
        keys: the map of names.
        path: the leaf's.
        tensors: official tensors by name.
        dtype: of the result; None keeps the tensors'.

    Yields:
        ``leaf[0]``, ``leaf[1]``, … of a stacked leaf, or the whole of one that is not stacked.

    Raises:
        WeightsError: if the leaf's tensors are of several types and no dtype is given.
    """
    shape = tuple(keys.ours[path].shape)
    shape = shape[1:] if stacked(path) else shape
    parts: dict[int | None, list[Entry]] = {}
    for entry in keys.of(path):
        parts.setdefault(entry.row, []).append(entry)
    before = None
    for index in sorted(parts, key=lambda i: i or 0):
        row = None
        for entry in parts[index]:
            tensor = tensors[entry.name]
            if dtype is None and before not in (None, tensor.dtype):
                raise WeightsError(
                    f"{entry.name} is {tensor.dtype} where its neighbours are {before}: say which "
                    "dtype they all shall have."
                )
            before = tensor.dtype
            if dtype is not None:
                tensor = tensor.astype(dtype, copy=False)
            if not entry.within:
                row = contiguous(entry.how.to_ours(tensor, shape))
                continue
            row = np.empty(shape, tensor.dtype) if row is None else row
            row[entry.within] = entry.how.to_ours(tensor, row[entry.within].shape)
        assert row is not None
        yield row


def load(
    tensors: Mapping[str, np.ndarray] | str | Path,
    cfg: ModelConfig,
    naming: str = "hf",
    *,
    keys: KeyMap | None = None,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Official weights as our parameters, all in memory.

    Args:
        tensors: `Tensors`, any mapping of official names to arrays, or a path of one.
        cfg: architecture the weights must fit exactly.
        naming: see `key_maps.components`.
        keys: a map to use instead of the naming's.
        dtype: of the result; None keeps the files'.

    Returns:
        Nested dict of numpy arrays. Leaves that the naming has no place for are left out.

    Raises:
        WeightsError: on anything missing, extra or misshapen; nothing is loaded then.
    """
    if isinstance(tensors, (str, Path)):
        tensors = Tensors(tensors)
    keys = key_map(cfg, naming) if keys is None else keys
    check(shapes(tensors), keys.shapes, getattr(tensors, "source", "The mapping of weights"))
    flat: dict[str, np.ndarray] = {}
    for path in keys.held:
        read = rows(keys, path, tensors, dtype)
        flat[path] = np.stack(list(read)) if stacked(path) else next(read)
    return unflatten(flat)


def module(cfg: ModelConfig, params: Mapping[str, Any], compute: Compute) -> nnx.Module:
    """A model that holds the given parameters.

    Args:
        cfg: architecture.
        params: nested dict as of `load`; leaves it lacks are filled with zeros.
        compute: dtype and rematerialisation.
    """
    empty = definition(cfg, compute)
    given = flatten(params)
    leaves = {}
    for path, variable in empty.variables.items():
        leaf = variable.get_value()
        leaves[path] = (
            jnp.asarray(given[path]) if path in given else jnp.zeros(leaf.shape, leaf.dtype)
        )
    return empty.merge(leaves)
