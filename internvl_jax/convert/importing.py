"""Official weights -> a checkpoint that training, evaluation and export start from.

A leaf is written row by row (one layer of a stacked one), so that memory holds a few tensors,
whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from internvl_jax import __version__
from internvl_jax.checkpoint.writer import StepWriter
from internvl_jax.convert import views
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.describe import described, resized
from internvl_jax.convert.from_torch import Tensors, rows
from internvl_jax.convert.key_maps import KeyMap, ModelConfig, key_map
from internvl_jax.convert.shards import FLOATS, WeightsError
from internvl_jax.convert.stream import ahead
from internvl_jax.convert.tokenizer_files import CHAT_TEMPLATE
from internvl_jax.convert.vocabulary import grown
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.nn.embed import resize_positions
from internvl_jax.observe.progress import ByteProgress

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
# What belongs to them: added pieces (``<IMG_CONTEXT>``) have no other place beside a .model file.
BESIDE_TOKENIZERS = (
    *("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", CHAT_TEMPLATE),
)
QLLAMA_LAYOUT = 2  # QLLaMA's layers rest in periods of so many, also where none cross-attends


@dataclasses.dataclass(frozen=True)
class Recognised:
    """Official files and what they were found to be.

    Attributes:
        cfg: architecture.
        naming: see `key_maps.components`.
        tensors: by the naming's names.
        config: their ``config.json``; empty without one.
        source: the files.
    """

    cfg: ModelConfig
    naming: str
    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    source: Path


def recognise(source: str | Path) -> Recognised:
    """Finds out what official files are, from their config and their tensors' names.

    Raises:
        WeightsError: the files cannot be read.
        ConfigError: they are no model that is known here.
    """
    source = Path(source)
    tensors = Tensors(source)
    path = (source if source.is_dir() else source.parent) / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}.") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds no settings.")
    cfg, naming = model_config(config or None, tensors.shapes)
    return Recognised(cfg, naming, views.of(tensors, cfg, naming), config, source)


def import_weights(
    source: str | Path,
    destination: str | Path,
    *,
    part: str | None = None,
    image_size: int | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Recognised:
    """Writes official weights as a checkpoint, all of them or nothing.

    Args:
        source: a weight file, or a folder of them with their ``config.json``.
        destination: work directory to create, local or in a bucket.
        part: for a tower or a decoder alone, what it shall be in the whole model: ``vision``,
            ``llm``, or ``qllama`` (the text tower of stage 1, whose layers rest in periods). By
            default a tower is ``vision`` and a decoder ``llm``.
        image_size: resize the position table for pictures of so many pixels.
        vocab_size: add rows to the decoder's embedding and head, each the mean of the old ones.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the files'. Scalars (the
            temperature) become float32 instead of a narrower one.
        overwrite: replace what the destination holds.
        quiet: show no progress.

    Returns:
        What the source was found to be.

    Raises:
        WeightsError: the weights are not those of the model that they seem to be, or a part was
            asked for that they are not.
        ConfigError: they are no model that is known here.
        CheckpointError: the destination holds a checkpoint.
    """
    if dtype is not None and dtype not in FLOATS:
        raise WeightsError(f"The dtype {dtype!r} cannot be written: use {', '.join(FLOATS)}.")
    found = recognise(source)
    part = _part(found, part)
    cfg = found.cfg
    if part == "qllama":
        assert isinstance(cfg, LlamaConfig)
        # The official class hard-codes this base, and gives the pad's embedding no gradient.
        cfg = dataclasses.replace(cfg, cross_frequency=QLLAMA_LAYOUT, pad_id=0)
    keys = key_map(cfg, found.naming)
    views.check(found.tensors, keys.shapes)
    _check_copies(found, keys)
    target = resized(cfg, image_size, vocab_size)
    shapes = {p: tuple(x.shape) for p, x in key_map(target, found.naming).ours.items()}

    writer = StepWriter(destination, overwrite=overwrite)
    try:
        _write(writer, found, keys, shapes, f"params/{part}/" if part else "params/", dtype, quiet)
        user = described(target, part)
        data = _habits(found)
        if (tokenizer := _copy_tokenizer(found.source, writer.workdir)) is not None:
            data["tokenizer"] = tokenizer
        origin = {"source": found.source.name, "library": f"internvl_jax {__version__}"}
        writer.commit({**user, "experiment": {"data": data}, "origin": origin})
    except BaseException:
        writer.abandon()
        raise
    return found


def _part(found: Recognised, part: str | None) -> str:
    if isinstance(found.cfg, VitConfig):
        fitting = ("vision",)
    elif isinstance(found.cfg, LlamaConfig):
        fitting = ("llm", "qllama")
    else:
        fitting = ("",)
    if part is None:
        return fitting[0]
    if part not in fitting:
        has = "a whole model" if fitting == ("",) else f"one that can be {' or '.join(fitting)}"
        raise WeightsError(f"{found.source} holds {has}: it cannot be imported as {part!r}.")
    return part


def _check_copies(found: Recognised, keys: KeyMap) -> None:
    """Raises WeightsError where a tied head, which is not read, is not the embedding's table."""
    for copy in (entry for entry in keys.entries.values() if entry.copy):
        (own,) = keys.of(copy.path)
        if not np.array_equal(found.tensors[copy.name], found.tensors[own.name]):
            raise WeightsError(
                f"{copy.name} and {own.name} of {found.source} differ, although its config ties "
                "them: set tie_word_embeddings to false."
            )


def _write(
    writer: StepWriter,
    found: Recognised,
    keys: KeyMap,
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    dtype: str | None,
    quiet: bool,
) -> None:
    chosen = None if dtype is None else FLOATS[dtype]
    # Scalars may have a type of their own.
    arrays = [name for name, shape in keys.shapes.items() if shape]
    smallest = min(arrays, key=lambda name: math.prod(keys.shapes[name]))
    itemsize = (found.tensors[smallest].dtype if chosen is None else chosen).itemsize
    total = itemsize * sum(math.prod(shape) for shape in shapes.values())
    progress = ByteProgress(total, "importing", quiet=quiet)
    for path in keys.held:
        as_what = chosen if shapes[path] or chosen is None else FLOATS["float32"]
        with contextlib.closing(ahead(_fitted(keys, path, shapes[path], found, as_what))) as read:
            first = next(read)
            if first.dtype not in FLOATS.values():
                raise WeightsError(
                    f"{keys.of(path)[0].name} of {found.source} is {first.dtype}, which parameters "
                    f"cannot be: say as which of {', '.join(FLOATS)} they shall be written."
                )
            every = progress.counting(itertools.chain([first], read))
            writer.leaf(prefix + path, shapes[path], first.dtype, every)
    progress.close()


def _fitted(
    keys: KeyMap, path: str, shape: tuple[int, ...], found: Recognised, dtype: Any
) -> Iterator[np.ndarray]:
    """The rows of a leaf, in the size that was asked for."""
    before = tuple(keys.ours[path].shape)
    for row in rows(keys, path, found.tensors, dtype):
        if shape == before:
            yield row
        elif path.endswith("pos"):
            side = round((shape[0] - 1) ** 0.5)
            yield resize_positions(row, (side, side)).astype(row.dtype)
        else:
            axis = next(i for i, (old, new) in enumerate(zip(before, shape)) if old != new)
            yield grown(row, shape[axis], axis)


def _habits(found: Recognised) -> dict[str, Any]:
    """How a dialogue model was trained: its template, and how pictures become squares."""
    if not isinstance(found.cfg, ChatConfig):
        return {}
    if found.naming.startswith("llava"):
        return {"template": "vicuna_v1", "resize": "pad"}
    if name := found.config.get("template"):
        return {"template": name}
    folder = found.source if found.source.is_dir() else found.source.parent
    jinja = folder / CHAT_TEMPLATE
    if jinja.is_file() and "<|im_start|>" in jinja.read_text():
        return {"template": "internvl2_5"}
    return {}


def _copy_tokenizer(source: Path, workdir: epath.Path) -> str | None:
    """Copies the files of a tokenizer; where its own file is then, if there is one."""
    folder = source if source.is_dir() else source.parent
    for name in (*TOKENIZERS, *BESIDE_TOKENIZERS):
        if (folder / name).is_file() and epath.Path(folder.resolve()) != workdir:
            (workdir / name).write_bytes((folder / name).read_bytes())
    own = [name for name in TOKENIZERS if (folder / name).is_file()]
    return str(workdir / own[0]) if own else None
