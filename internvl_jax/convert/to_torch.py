"""Our parameters -> a folder of official PyTorch weights: safetensors, index, config.json."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from internvl_jax import __version__
from internvl_jax.checkpoint import iter_leaves
from internvl_jax.checkpoint.storage import find_step, load_meta
from internvl_jax.convert.architectures import official_config
from internvl_jax.convert.from_torch import WeightsError
from internvl_jax.convert.key_maps import KeyMap, ModelConfig, key_map, some
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.stages.registry import stage_from_config
from internvl_jax.tree import flatten

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
SHARD_BYTES = 5 * 10**9


def export(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    destination: str | Path,
    *,
    naming: str = "hf",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes official weights, all of them or nothing.

    Everything is written beside the destination and renamed at the end, so that an interrupted
    export never leaves a folder that looks complete.

    Args:
        params: our parameters, nested or by path; whatever has a shape and can be sliced.
        cfg: their architecture.
        destination: folder to create.
        naming: ``hf`` (InternVL-14B, of which a stage-1 model fills its part; bare InternViT) or
            ``plain`` (the stage-1 file of the two towers).
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps each parameter's.
        shard_bytes: largest file; a tensor that is larger has a file of its own.
        metadata: text to put into each file's header.
        config: entries to add to ``config.json``.
        overwrite: replace an existing folder.

    Returns:
        Our leaves that were left out because the naming has no place for them.

    Raises:
        WeightsError: if the parameters are not those of the architecture, or the folder exists.
    """
    destination = Path(destination)
    if dtype is not None and dtype not in DTYPES:
        raise WeightsError(f"The dtype {dtype!r} cannot be written: use {', '.join(DTYPES)}.")
    if destination.exists() and not overwrite:
        raise WeightsError(f"{destination} exists: choose another folder, or ask to overwrite it.")
    if not isinstance(cfg, (InternVLConfig, VitConfig)):
        raise WeightsError("Only InternVL and InternViT models have official names to export to.")
    keys = key_map(cfg, naming)
    flat = _checked(params, keys)
    described = {**official_config(cfg, naming), **(config or {})}

    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.unfinished-"
    working = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        _write(working, flat, keys, dtype, shard_bytes, dict(metadata or {}))
        kinds = sorted({str(np.dtype((dtype and DTYPES[dtype]) or flat[p].dtype)) for p in flat})
        described["torch_dtype"] = kinds[0] if len(kinds) == 1 else "float32"
        _save_json(working / "config.json", described)
        working.chmod(0o755)
        _replace(working, destination)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return keys.nameless


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    naming: str = "hf",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Exports the model of a stage-1 or stage-2 run; no device is touched.

    Args:
        source: a run's work directory, its ``checkpoints`` directory, or one step's.
        destination, naming, dtype, shard_bytes, overwrite: see `export`.
        step: which checkpoint; the newest by default.
        ema: take the moving average of the trained parameters where there is one.

    Returns:
        As `export`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: its description of the stage cannot be right.
        WeightsError: as `export`, or the stage's model has no official names.
    """
    meta = load_meta(find_step(source, step))
    stage = stage_from_config(meta.user.get("stage", {}), f"the stage in {source}")
    cfg = getattr(stage, "model", None)
    if not isinstance(cfg, InternVLConfig):
        raise WeightsError(
            f"{source} is a run of the stage {stage.name!r}: only models of the contrastive and "
            "the generative stage can be exported."
        )
    flat: dict[str, Any] = {}
    roots = ("ema", "params", "frozen") if ema else ("params", "frozen")
    leaves = {leaf.path: leaf for leaf in iter_leaves(source, meta.step)}
    for root in roots:
        for path, leaf in leaves.items():
            inner = path.removeprefix(f"{root}/")
            if path != inner and inner not in flat:
                flat[inner] = leaf.read()
    metadata = {
        "stage": stage.name,
        "step": str(meta.step),
        "library": f"internvl_jax {__version__}",
    }
    return export(
        flat,
        cfg,
        destination,
        naming=naming,
        dtype=dtype,
        shard_bytes=shard_bytes,
        metadata=metadata,
        overwrite=overwrite,
    )


def _checked(params: Mapping[str, Any], keys: KeyMap) -> dict[str, Any]:
    flat = flatten(params)
    faults = []
    for what, paths in (
        ("lack", [p for p in keys.ours if p not in flat]),
        ("have the unknown", [p for p in flat if p not in keys.ours]),
        ("misshape", [p for p in flat if p in keys.ours and flat[p].shape != keys.ours[p].shape]),
    ):
        if paths:
            faults.append(f"{what} {some(paths)}")
    if faults:
        raise WeightsError(f"The parameters do not fit the model: they {'; they '.join(faults)}.")
    return {p: np.asarray(x) if isinstance(x, jax.Array) else x for p, x in flat.items()}


def _write(
    folder: Path,
    flat: Mapping[str, Any],
    keys: KeyMap,
    dtype: str | None,
    shard_bytes: int,
    metadata: dict[str, str],
) -> None:
    def size(name: str) -> int:
        stored = flat[keys.entries[name].path].dtype if dtype is None else np.dtype(DTYPES[dtype])
        return int(np.prod(keys.shapes[name], dtype=np.int64)) * stored.itemsize

    shards = list(_shards({name: size(name) for name in sorted(keys.entries)}, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = keys.to_official(flat, name)
            tensors[name] = tensor if dtype is None else tensor.astype(DTYPES[dtype])
            weight_map[name] = file
        # The official loaders read nothing without this entry.
        save_file(tensors, folder / file, metadata={"format": "pt", **metadata})
    total = {"total_size": sum(map(size, weight_map))}
    index = {"metadata": {**total, **metadata}, "weight_map": weight_map}
    _save_json(folder / "model.safetensors.index.json", index)


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _replace(working: Path, destination: Path) -> None:
    """Renames the finished folder into place; an older one goes only once the new one stands."""
    for path in working.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not destination.exists():
        working.rename(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
    destination.rename(old / destination.name)
    try:
        working.rename(destination)
    except OSError:
        (old / destination.name).rename(destination)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
