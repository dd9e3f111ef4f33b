"""Our parameters -> a folder for PyTorch: safetensors, index, config and what else belongs to it.

Tensors are made and written one after another in the order of the layers, so that memory holds a
few of them, whatever the size of the model.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax import __version__
from internvl_jax.checkpoint import iter_leaves
from internvl_jax.checkpoint.storage import find_step, load_meta
from internvl_jax.convert.adapters import merge, write_peft
from internvl_jax.convert.card import card
from internvl_jax.convert.describe import model_of
from internvl_jax.convert.formats import FORMATS, About, Files
from internvl_jax.convert.key_maps import KeyMap, ModelConfig, key_map, leaves, some
from internvl_jax.convert.shards import FLOATS, WeightsError, divide, settle, write
from internvl_jax.convert.stream import ArrayRows, Rows, ahead, stored_rows
from internvl_jax.convert.transpose import contiguous
from internvl_jax.models.adapters import without_adapters
from internvl_jax.observe.progress import ByteProgress
from internvl_jax.tree import flatten

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
CHECKSUMS = "checksums.sha256"


def export(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    destination: str | Path,
    *,
    format: str = "official",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    about: About | None = None,
    metadata: Mapping[str, str] | None = None,
    adapters_of: Sequence[str] | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> tuple[str, ...]:
    """Writes a model for PyTorch, all of it or nothing; adapters are merged into its weights.

    Everything is written beside the destination and renamed at the end, so that an interrupted
    export never leaves a folder that looks complete.

    Args:
        params: our parameters, nested or by path: arrays, or `stream.Rows`.
        cfg: their architecture.
        destination: folder to create.
        format: one of `formats.FORMATS`.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps each parameter's. Scalars (the
            temperature) keep float32.
        shard_bytes: largest file; a tensor that is larger has a file of its own.
        about: what else is known of the model.
        metadata: text to put into each file's header.
        adapters_of: write the adapters and nothing else, in PEFT's form and the format's names,
            with those of these trained leaves that are no adapters.
        overwrite: replace an existing export.
        quiet: show no progress.

    Returns:
        Our leaves that were left out because the format has no place for them.

    Raises:
        WeightsError: if the parameters are not those of the architecture, the format cannot hold
            them, or the folder exists.
        CheckpointError: if what was read from a checkpoint is not what was written to it.
    """
    destination = Path(destination)
    if dtype is not None and dtype not in FLOATS:
        raise WeightsError(f"The dtype {dtype!r} cannot be written: use {', '.join(FLOATS)}.")
    _free(destination, overwrite)
    form = FORMATS[format]
    bare = without_adapters(cfg)
    try:
        keys = key_map(form.fitted(bare), form.naming)
    except WeightsError:
        raise
    except ValueError:
        raise WeightsError(
            f"The format {format!r} cannot hold this model: use {' or '.join(_holding(bare))}."
        ) from None
    rows = _checked(params, cfg)
    if adapters_of is not None:
        return _export_adapters(destination, rows, cfg, keys, adapters_of, metadata or {})
    rows = merge(rows, cfg)
    layout = _layout(keys, rows, dtype)
    # Scalars stay float32 whatever the others are.
    widest = max((d for shape, d in layout.values() if shape), key=lambda d: d.itemsize)
    about = dataclasses.replace(about or About(bare), cfg=bare, dtype=dtype or str(widest))
    beside = form.files(about)
    beside.setdefault("README.md", card(about, format, len(keys.entries), form.caveats(about)))

    with _created(destination) as working:
        digests = _lay_down(working, beside)
        digests |= _write(working, rows, keys, layout, shard_bytes, dict(metadata or {}), quiet)
        _list(working, digests)
    return keys.nameless


def _holding(cfg: ModelConfig) -> list[str]:
    """The formats that have names for all of a model."""
    found = []
    for name, form in FORMATS.items():
        with contextlib.suppress(ValueError):
            form.files(About(form.fitted(cfg)))
            key_map(form.fitted(cfg), form.naming)
            found.append(name)
    return found


def _free(destination: Path, overwrite: bool) -> None:
    """Raises WeightsError where writing would cost what is there; only exports are replaced."""
    if not destination.exists():
        return
    if not overwrite:
        raise WeightsError(f"{destination} exists: choose another folder, or ask to overwrite it.")
    if not (destination / CHECKSUMS).is_file():
        raise WeightsError(
            f"{destination} is no export ({CHECKSUMS} is not there), so it is not replaced: choose "
            "another folder."
        )


def _export_adapters(
    destination: Path,
    rows: Mapping[str, Rows],
    cfg: ModelConfig,
    keys: KeyMap,
    trained: Sequence[str],
    metadata: Mapping[str, str],
) -> tuple[str, ...]:
    with _created(destination) as working:
        _list(working, write_peft(working, rows, cfg, keys, trained, metadata))
    return tuple(path for path in trained if path in keys.nameless)


@contextlib.contextmanager
def _created(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes the destination if all goes well."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{destination.name}.unfinished-"
    for abandoned in destination.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    working = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    try:
        yield working
        working.chmod(0o755)
        _replace(working, destination)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _list(folder: Path, digests: Mapping[str, str]) -> None:
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    (folder / CHECKSUMS).write_text(listed)


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    format: str = "official",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
    adapters: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> tuple[str, ...]:
    """Exports the model of a run, or of imported weights; no device is touched.

    Args:
        source: a run's work directory, its ``checkpoints`` directory, or one step's.
        destination, format, dtype, shard_bytes, overwrite, quiet: see `export`.
        step: which checkpoint; the newest by default.
        ema: take the moving average of the trained parameters.
        tokenizer: the model's tokenizer; by default the one that the run names, if it is there.
        adapters: write what a run with adapters trained instead of the whole model.

    Returns:
        As `export`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: its description of the stage cannot be right.
        WeightsError: as `export`; there is no average.
    """
    step_dir = find_step(source, step)
    meta = load_meta(step_dir)
    cfg, prefix = model_of(meta.user, source)
    stage, data = meta.user.get("stage", {}), meta.user.get("experiment", {}).get("data", {})
    named = data.get("tokenizer")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise WeightsError(f"The tokenizer {tokenizer} is no file: name the .model or .json file.")
    if tokenizer is None and named:
        # Imported weights have it beside them, wherever they were moved.
        places = (Path(named), Path(step_dir.parent.parent) / Path(named).name)
        tokenizer = next((place for place in places if place.is_file()), None)
        if tokenizer is None:
            log.warning(f"The tokenizer {named} is not there: the export has none (--tokenizer).")
    origin = f"Step {meta.step:,} of {Path(source).name}" + (
        f", stage {stage['name']!r}" if stage.get("name") else ""
    )
    about = About(
        cfg,
        stage,
        data,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        origin=f"{origin}, written by internvl_jax {__version__}.",
    )
    metadata = {"step": str(meta.step), "library": f"internvl_jax {__version__}"}
    if stage.get("name"):
        metadata["stage"] = stage["name"]
    chosen: dict[str, Any] = {}
    stored = {leaf.path: leaf for leaf in iter_leaves(source, meta.step)}
    if ema and not any(path.startswith("ema/") for path in stored):
        raise WeightsError(f"{source} keeps no averaged parameters: leave --ema out.")
    for root in ("ema", "params", "frozen") if ema else ("params", "frozen"):
        start = f"{root}/{prefix}"
        for path, leaf in stored.items():
            if path.startswith(start):
                chosen.setdefault(path.removeprefix(start), leaf)
    trained = [p.removeprefix(f"params/{prefix}") for p in stored if p.startswith("params/")]
    with stored_rows(chosen, Path(destination)) as rows:
        return export(
            rows,
            cfg,
            destination,
            format=format,
            dtype=dtype,
            shard_bytes=shard_bytes,
            about=about,
            metadata=metadata,
            adapters_of=trained if adapters else None,
            overwrite=overwrite,
            quiet=quiet,
        )


def _checked(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Rows]:
    flat: dict[str, Any] = dict(flatten(params))
    ours = leaves(cfg)
    faults = []
    for what, paths in (
        ("lack", [p for p in ours if p not in flat]),
        ("have the unknown", [p for p in flat if p not in ours]),
        ("misshape", [p for p in flat if p in ours and flat[p].shape != ours[p].shape]),
    ):
        if paths:
            faults.append(f"{what} {some(paths)}")
    if faults:
        raise WeightsError(f"The parameters do not fit the model: they {'; they '.join(faults)}.")
    return {p: x if isinstance(x, Rows) else ArrayRows(x) for p, x in flat.items()}


def _natural(name: str) -> list[Any]:
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", name)]


def _layout(
    keys: KeyMap, rows: Mapping[str, Rows], dtype: str | None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every tensor, in the order of writing: layer by layer."""
    layout = {}
    for name in sorted(keys.entries, key=_natural):
        shape, stored = keys.shapes[name], rows[keys.entries[name].path].dtype
        chosen = stored if dtype is None or not shape else FLOATS[dtype]
        layout[name] = (shape, chosen)
    return layout


def _tensors(
    keys: KeyMap, rows: Mapping[str, Rows], layout: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> Iterator[np.ndarray]:
    """The tensors of a layout, a row being read once and forgotten after its last tensor."""
    entries = [keys.entries[name] for name in layout]
    uses = collections.Counter((entry.path, entry.row) for entry in entries)
    held: dict[tuple[str, int | None], np.ndarray] = {}
    for entry in entries:
        place = entry.path, entry.row
        if place not in held:
            held[place] = rows[entry.path].row(entry.row)
        x = entry.how.to_official(np.asarray(held[place][entry.within]))
        uses[place] -= 1
        if not uses[place]:
            del held[place]
        yield contiguous(x.astype(layout[entry.name][1], order="K", copy=False))
    for path in {entry.path for entry in entries}:
        rows[path].finish()


def _write(
    folder: Path,
    rows: Mapping[str, Rows],
    keys: KeyMap,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    shard_bytes: int,
    metadata: dict[str, str],
    quiet: bool,
) -> dict[str, str]:
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}
    progress = ByteProgress(sum(sizes.values()), "exporting", quiet=quiet)
    files = divide(sizes, shard_bytes)
    weight_map, digests, settling = {}, {}, []
    with (
        ThreadPoolExecutor(1) as disk,
        contextlib.closing(ahead(_tensors(keys, rows, layout))) as arrays,
    ):
        passing = progress.counting(arrays)
        for number, names in enumerate(files, 1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            # The official loaders read nothing without the first entry.
            header = {"format": "pt", **metadata}
            digests[file] = write(folder / file, names, layout, passing, header)
            settling.append(disk.submit(settle, folder / file))  # while the next one is written
        next(passing, None)  # runs the comparison with the fingerprints
        for future in settling:
            future.result()  # a disk says only once that it failed
    progress.close()
    total = {"total_size": sum(sizes.values())}
    index = {"metadata": {**total, **metadata}, "weight_map": weight_map}
    name = "model.safetensors.index.json"
    return digests | _lay_down(folder, {name: (json.dumps(index, indent=2) + "\n").encode()})


def _lay_down(folder: Path, files: Files) -> dict[str, str]:
    """Writes small files; returns their digests."""
    digests = {}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.read_bytes() if isinstance(content, Path) else content
        path.write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def _replace(working: Path, destination: Path) -> None:
    """Renames the finished folder into place; an older one goes only once the new one stands."""
    for path in working.rglob("*"):
        if path.is_file():
            settle(path)
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
