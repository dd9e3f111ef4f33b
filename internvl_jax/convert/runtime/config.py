"""``config.json`` of an exported folder, checked and as dataclasses."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT, VERSION = "internvl_jax.plain", 1
IMAGE_PLACEHOLDER = "<image>"
RESIZES = ("squash", "crop", "pad")


class FolderError(ValueError):
    """A folder that cannot be served; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Architecture of an InternViT.

    Attributes:
        image_size: native size in pixels; fixes the position table.
        norm: ``rms`` or ``layer``.
        qk_norm: RMSNorm on q and k over the full width.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    norm: str
    qk_norm: bool
    qkv_bias: bool
    eps: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a LLaMA-like decoder.

    Attributes:
        kv_heads: heads of keys and values; fewer than `heads` groups the queries.
        qk_norm: per-head RMSNorm on q and k (Qwen3).
        tied_head: logits use the embedding table.
        head: whether there is an output head at all.
        cross_frequency, vision_width: every so many layers one that reads vision tokens of that
            width; a width of 0 for none.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    eps: float
    rope_theta: float
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    tied_head: bool
    head: bool
    cross_frequency: int
    vision_width: int


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """Architecture of InternVL; ``queries=0`` is InternVL-C alone, without queries and captions."""

    vision: VitConfig
    qllama: DecoderConfig
    queries: int
    embed_dim: int
    pool_heads: int


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Architecture of a dialogue model.

    Attributes:
        qllama, queries: QLLaMA between the tower and the language model; None and 0 for none.
        projector: of the patch tokens, ``mlp2x_gelu``, ``mlp1`` or ``none``.
        unshuffle: version of ``mlp1``'s pixel unshuffle, ``v1`` or ``v2``.
        select_layer: the hidden state that patch tokens are read from, from the end: -1 is the last
            block's output.
    """

    vision: VitConfig
    llm: DecoderConfig
    qllama: DecoderConfig | None
    queries: int
    projector: str
    unshuffle: str
    select_layer: int

    def visual_tokens(self, image_size: int) -> int:
        """How many of the language model's positions a picture of so many pixels takes."""
        patches = (image_size // self.vision.patch_size) ** 2
        return (
            self.queries + {"mlp2x_gelu": patches, "mlp1": patches // 4, "none": 0}[self.projector]
        )


ModelConfig = VitConfig | DecoderConfig | InternVLConfig | ChatConfig
KINDS: dict[str, type] = {
    "vit": VitConfig,
    "decoder": DecoderConfig,
    "internvl": InternVLConfig,
    "chat": ChatConfig,
}


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels: side, one of `RESIZES`, mean and deviation (of 0..1)."""

    size: int
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation becomes text, round by round: ``{system} {user}: … {assistant}: …``.

    ``roles=False`` is a template of captions: no names, an answer ends with a newline.
    """

    system: str
    user: str
    assistant: str
    roles: bool


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How a text becomes token ids.

    Attributes:
        tokenizer: name of the sentencepiece model in the folder; None: the folder has none.
        length: tokens of a row that is embedded.
        prefix: glued in front of every text that is embedded.
        prompts: language code -> what stands before a caption in it.
        template: of conversations.
    """

    tokenizer: str | None
    length: int
    bos_id: int
    eos_id: int
    pad_id: int
    prefix: str
    prompts: dict[str, str]
    template: Template | None


@dataclasses.dataclass(frozen=True)
class Config:
    """All of ``config.json``; `generation` holds `generate.Settings` to start from."""

    name: str
    model: ModelConfig
    image: ImageConfig | None
    text: TextConfig | None
    generation: dict[str, Any]


def read(folder: str | Path) -> Config:
    """Reads ``config.json``.

    Args:
        folder: an exported one.

    Raises:
        FolderError: if it is missing, no JSON, of another format, or lacks something.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise FolderError(f"There is no {path}: give a folder of the format {FORMAT}.") from None
    except ValueError as error:
        raise FolderError(f"{path} is not JSON ({error}): export the folder again.") from None
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if found != (FORMAT, VERSION):
        raise FolderError(
            f"{path} is not of the format {FORMAT}, version {VERSION}: export it with --format "
            "plain, by the release whose code this is."
        )
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise FolderError(f"{path} has kind={kind!r}: known are {', '.join(KINDS)}.")
    del values["format"], values["version"]
    values.setdefault("name", Path(folder).resolve().name)
    model = _read(KINDS[kind], values.pop("model", None), f"{path}: model")
    config = _read(Config, {**values, "model": model}, f"{path}: config")
    if config.image is not None and config.image.resize not in RESIZES:
        raise FolderError(f"{path}: image.resize={config.image.resize!r}; use one of {RESIZES}.")
    return config


def _read(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping that must name exactly its fields."""
    if not isinstance(values, Mapping):
        raise FolderError(f"{where} is {values!r}, not a table of settings.")
    hints = typing.get_type_hints(cls)
    if hints.keys() != values.keys():
        lacks, odd = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
        said = [f"lacks {', '.join(lacks)}"] * bool(lacks)
        said += [f"has the unknown {', '.join(odd)}"] * bool(odd)
        raise FolderError(f"{where} {' and '.join(said)}.")
    return cls(**{name: _value(hints[name], values[name], f"{where}.{name}") for name in hints})


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        hints = typing.get_args(hint)
        if (value is None and type(None) in hints) or isinstance(value, hints):
            return value
        hint = hints[0]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read(hint, value, where)
    origin: Any = typing.get_origin(hint) or hint
    if origin is tuple and isinstance(value, list):
        return tuple(float(v) for v in value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise FolderError(
            f"{where} is {value!r}, which is no {getattr(origin, '__name__', origin)}."
        )
    return value
