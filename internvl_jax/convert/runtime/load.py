"""A folder -> its model: strictly checked, shard by shard, in memory once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .chat import InternVLChat
from .config import ChatConfig, Config, DecoderConfig, FolderError, InternVLConfig, VitConfig, read
from .decoder import Decoder
from .internvl import InternVL
from .vit import InternViT

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODULES: dict[type, type] = {
    VitConfig: InternViT,
    DecoderConfig: Decoder,
    InternVLConfig: InternVL,
    ChatConfig: InternVLChat,
}


def load(
    folder: str | Path, *, device: str | None = None, dtype: str | None = None
) -> tuple[Config, nn.Module]:
    """Reads config and weights.

    The model is laid out without memory first, then filled shard by shard: it exists once, and one
    shard beside it.

    Args:
        folder: an exported one.
        device: as torch names it; a GPU where there is one by default.
        dtype: one of `DTYPES`; by default float32 on a CPU, else what the files hold most of.
            Scalars are float32 in any case.

    Returns:
        What ``config.json`` says, and the model in evaluation mode.

    Raises:
        FolderError: one sentence naming what is missing, extra, misshapen or damaged.
    """
    folder = Path(folder)
    config = read(folder)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in (None, *DTYPES):
        raise FolderError(f"The dtype {dtype!r} is unknown: use {', '.join(DTYPES)}.")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below
            model = MODULES[type(config.model)](config.model)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise FolderError(f"{folder}/config.json describes no model: {reason}.") from None
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shards = _shards(folder)
    found: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, int] = {}
    for path in shards:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                if name in found:
                    raise FolderError(f"{folder} holds the tensor {name} twice.")
                part = file.get_slice(name)
                found[name] = tuple(part.get_shape())
                kinds[part.get_dtype()] = kinds.get(part.get_dtype(), 0) + 1
    _check(found, expected, folder)
    if dtype is None:
        most = max(kinds, key=lambda kind: kinds[kind])
        stored = {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)
        wanted = torch.float32 if where.type == "cpu" else stored
    else:
        wanted = DTYPES[dtype]
    for path in shards:
        with _opened(path) as file:
            names = list(file.keys())
            part = {name: _placed(file.get_tensor(name), where, wanted) for name in names}
        # Names and shapes are checked above, over all shards.
        model.load_state_dict(part, strict=False, assign=True)
    return config, model.eval().requires_grad_(False)


def _placed(x: torch.Tensor, where: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # In bfloat16 the temperature, of which a scalar is the logarithm, would be 1 % off.
    return x.to(where, dtype if x.ndim else torch.float32)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if single := sorted(folder.glob("*.safetensors")):
            return single
        raise FolderError(f"{folder} holds no .safetensors file: export it again.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{index} is damaged ({error!r}): export the folder again.") from None
    for name in names:
        # A name is no path: nothing outside of the folder is opened.
        if not isinstance(name, str) or Path(name).name != name:
            raise FolderError(f"{index} lists {name!r}, which is no file name.")
        if not (folder / name).is_file():
            raise FolderError(f"{folder} lacks {name}, which {INDEX} lists: copy it again.")
    return [folder / name for name in names]


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise FolderError(
            f"{path} is not a readable safetensors file ({error}): copy it again."
        ) from None


def _check(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], folder: Path
) -> None:
    wrong = [
        f"{name} (is {list(found[name])}, should be {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = []
    for what, names in (
        ("lacks", [n for n in expected if n not in found]),
        ("has the unknown", [n for n in found if n not in expected]),
        ("misshapes", wrong),
    ):
        if names:
            faults.append(f"{what} {_some(names)}")
    if faults:
        raise FolderError(f"{folder} does not fit its config.json: it {'; it '.join(faults)}.")


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
