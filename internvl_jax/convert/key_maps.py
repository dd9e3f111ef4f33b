"""Our parameters <-> the official tensors of a whole model, in both directions.

Layers are stacked in our leaves and numbered in the official names; `KeyMap` pairs each official
tensor with the slice of our leaf that holds it. Shapes come from the abstract model, so the map of
14 B parameters exists without allocating any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from internvl_jax.convert.names import (
    HEADS,
    LLAMA,
    LLAMA_COPIED_HEAD,
    LLAMA_LAYER,
    LLAMA_PLAIN,
    MLP1,
    MLP1_NATIVE,
    MLP2X,
    POOL,
    VIT,
    VIT_LAYER,
    VIT_NATIVE,
    VIT_NATIVE_LAYER,
    VIT_PLAIN,
    VIT_PLAIN_LAYER,
    Names,
    Part,
    Shape,
    Transform,
)
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition, stacked
from internvl_jax.models.intern_vit import InternViT, VitConfig
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.models.llama import Llama, LlamaConfig

ModelConfig = VitConfig | LlamaConfig | InternVLConfig | ChatConfig

MODULES: dict[type, type] = {
    VitConfig: InternViT,
    LlamaConfig: Llama,
    InternVLConfig: InternVL,
    ChatConfig: InternVLChat,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One official tensor: ``official == how.to_official(ours[path][at])``.

    A `copy` is written like the others, but its leaf is read from another entry.
    """

    name: str
    path: str
    at: tuple[Any, ...]
    how: Transform
    copy: bool = False

    @property
    def row(self) -> int | None:
        """Which row of a stacked leaf it is in; None where the leaf is not stacked."""
        return self.at[0] if stacked(self.path) else None

    @property
    def within(self) -> tuple[Any, ...]:
        """Index of it inside of that row, or of the whole leaf."""
        return self.at[1:] if stacked(self.path) else self.at


@dataclasses.dataclass(frozen=True)
class Component:
    """One module in a naming: which of our leaves it covers, under which names.

    Attributes:
        ours, official: prefixes of our paths and of the official names.
        own, layer: tables of the module's own leaves and of one layer's.
        layers: official name of a layer, with ``{}`` for its number.
        period: layers per scanned step (a decoder's cross-attention frequency).
        whole: layers inside whole periods; the others are our unstacked ``tail``.
        nameless: leaves for which this naming has no place, or beginnings of their paths.
    """

    ours: str
    official: str
    own: Names
    layer: Names = dataclasses.field(default_factory=dict)
    layers: str = ""
    period: int = 1
    whole: int = 0
    nameless: tuple[str, ...] = ()

    def entries(self, path: str, shape: Shape) -> Iterator[Entry]:
        """Every official tensor that holds a part of one of our leaves. Raises KeyError."""
        inner = path.removeprefix(self.ours)
        table = self.own
        slices: list[tuple[Shape, str]] = [((), "")]
        for beginning in ("blocks/layers/", "periods/layers/", "tail/"):
            if not inner.startswith(beginning):
                continue
            slot, inner = _slot(inner.removeprefix(beginning))
            table = self.layer
            if beginning == "tail/":
                slices = [((), self.layers.format(self.whole + slot))]
            else:
                numbers = range(slot, slot + shape[0] * self.period, self.period)
                slices = [((i,), self.layers.format(n)) for i, n in enumerate(numbers)]
        parts = table[inner]
        for at, prefix in slices:
            for part in (parts,) if isinstance(parts, Part) else parts:
                name = f"{self.official}{prefix}{part.name}"
                yield Entry(name, path, (*at, *part.at), part.how, part.copy)


def _slot(inner: str) -> tuple[int, str]:
    """A layer's place in its period and the path below it: first = 0, rest/j = j + 1."""
    head, _, below = inner.partition("/")
    if head == "first":
        return 0, below
    if head == "rest":
        number, _, below = below.partition("/")
        return int(number) + 1, below
    return 0, inner


# A tower's own table, one layer's, and what its layers are called.
VIT_STYLES: dict[str, tuple[Names, Names, str]] = {
    "hf": (VIT, VIT_LAYER, "encoder.layers.{}."),
    "plain": (VIT_PLAIN, VIT_PLAIN_LAYER, "blocks.{}."),
    "native": (VIT_NATIVE, VIT_NATIVE_LAYER, "encoder.layer.{}."),
}


def _vit(ours: str, official: str, style: str = "hf") -> Component:
    return Component(ours, official, *VIT_STYLES[style])


def _llama(cfg: LlamaConfig, ours: str, official: str, style: str = "hf") -> Component:
    whole = cfg.depth // cfg.period * cfg.period
    if style == "plain":
        rest = ("transformer.layers.{}.", cfg.period, whole, ("lm_head",))
        return Component(ours, official, LLAMA_PLAIN, LLAMA_LAYER, *rest)
    own = LLAMA_COPIED_HEAD if style == "copied head" and cfg.tied_head else LLAMA
    return Component(ours, official, own, LLAMA_LAYER, "model.layers.{}.", cfg.period, whole)


def mlp(ours: str, official: str) -> Component:
    """A two-layer projector."""
    return Component(ours, official, MLP2X)


def tower(cfg: ChatConfig, official: str) -> list[Component]:
    """The vision side of a dialogue model before its projectors, as LLaVA-style files name it."""
    if cfg.qllama is None:
        return [_vit("vision/", official)]
    return [
        _vit("vision/", f"{official}vision_model."),
        _llama(cfg.qllama, "qllama/", f"{official}qllama."),
        Component("", official, HEADS),
    ]


LLAVA_TOWER = "model.vision_tower.vision_tower."


def components(cfg: ModelConfig, naming: str) -> list[Component]:
    """The modules of a model under one of the official namings.

    Args:
        cfg: architecture.
        naming: ``hf`` (InternVL-14B, bare InternViT, LLaMA), ``plain`` (the stage-1 file of the
            two towers), ``native`` (transformers' InternVLVisionModel and, as it saves it,
            InternVLForConditionalGeneration), and of dialogue models ``llava`` (LLaVA-style),
            ``llava-without-tower`` (the same where the tower is a folder of its own) and
            ``remote`` (InternVLChatModel); ``runtime`` is what `convert.runtime` reads, of all.

    Raises:
        ValueError: for a naming this kind of model does not have.
    """
    match cfg, naming:
        case VitConfig(), "hf" | "plain" | "native":
            return [_vit("", "", naming)]
        case LlamaConfig(), "hf":
            return [_llama(cfg, "", "")]
        case InternVLConfig(), "hf":
            return [
                _vit("vision/", "vision_model."),
                _llama(cfg.qllama, "qllama/", "qllama."),
                Component("clip_projector/", "clip_projector.", POOL),
                Component("clip_projector2/", "clip_projector2.", POOL),
                Component("", "", HEADS, nameless=("logit_bias",)),
            ]
        case InternVLConfig(queries=0), "plain":
            return [
                _vit("vision/", "", "plain"),
                _llama(cfg.qllama, "qllama/", "", "plain"),
                Component("clip_projector/", "clip_projector.", POOL),
                Component("", "", HEADS, nameless=("logit_bias",)),
            ]
        case ChatConfig(projector="mlp2x_gelu" | "none"), "llava" | "llava-without-tower":
            if naming == "llava":
                vision = tower(cfg, LLAVA_TOWER)
            else:
                ours = ("vision/", "qllama/", "query_tokens")
                vision = [Component(path, "", {}, nameless=("",)) for path in ours]
            parts = [*vision, _llama(cfg.llm, "llm/", "")]
            glue = "model.mm_projector."
            if cfg.qllama is None or cfg.projector == "none":
                return [*parts, mlp("projector/", glue), mlp("query_projector/", glue)]
            return [
                *parts,
                mlp("projector/", f"{glue}mlp1."),
                mlp("query_projector/", f"{glue}mlp2."),
            ]
        case ChatConfig(qllama=None, projector="mlp1"), "remote":
            return [
                _vit("vision/", "vision_model."),
                Component("projector/", "mlp1.", MLP1),
                # The official config never ties the head: a tied one is written as a copy.
                _llama(cfg.llm, "llm/", "language_model.", "copied head"),
            ]
        case ChatConfig(qllama=None, projector="mlp1"), "native":
            return [
                _vit("vision/", "vision_tower.", "native"),
                Component("projector/", "multi_modal_projector.", MLP1_NATIVE),
                _llama(cfg.llm, "llm/", "language_model."),
            ]
        case ChatConfig(), "runtime":
            glue = MLP1 if cfg.projector == "mlp1" else MLP2X
            parts = [
                _vit("vision/", "vision_model."),
                Component("projector/", "projector.", glue),
                mlp("query_projector/", "query_projector."),
                Component("", "", HEADS),
                _llama(cfg.llm, "llm/", "language_model."),
            ]
            return parts + ([_llama(cfg.qllama, "qllama/", "qllama.")] if cfg.qllama else [])
        case VitConfig() | LlamaConfig() | InternVLConfig(), "runtime":
            return components(cfg, "hf")
    raise ValueError(f"The naming {naming!r} does not exist for this kind of {type(cfg).__name__}.")


def definition(cfg: ModelConfig, compute: Compute) -> Definition:
    """The model of a config, without its arrays."""
    module = MODULES[type(cfg)]
    return Definition.of(lambda rngs: module(cfg, compute, rngs=rngs), lambda path: True)


def leaves(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """A model's leaves by path, without their arrays."""
    variables = definition(cfg, Compute()).variables
    return {path: variable.get_value() for path, variable in variables.items()}


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Every official tensor of a model with its shape, and where it lives in our parameters.

    Attributes:
        ours: our leaves by path (abstract).
        entries: official name -> where its values are.
        shapes: official name -> official shape.
        nameless: our leaves for which the naming has no place.
    """

    ours: dict[str, jax.ShapeDtypeStruct]
    entries: dict[str, Entry]
    shapes: dict[str, Shape]
    nameless: tuple[str, ...]

    def to_official(self, params: Mapping[str, Any], name: str) -> np.ndarray:
        """One official tensor out of our flat parameters (also right for their gradients)."""
        entry = self.entries[name]
        return np.array(entry.how.to_official(np.asarray(params[entry.path][entry.at])), order="C")

    @property
    def held(self) -> list[str]:
        """Our leaves that official tensors hold, in their own order."""
        named = {entry.path for entry in self.entries.values()}
        return [path for path in self.ours if path in named]

    def of(self, path: str) -> list[Entry]:
        """The official tensors that hold one of our leaves, copies left out."""
        return [e for e in self.entries.values() if e.path == path and not e.copy]


def key_map(cfg: ModelConfig, naming: str, parts: list[Component] | None = None) -> KeyMap:
    """The map of a model under an official naming.

    Args:
        cfg: architecture.
        naming: see `components`.
        parts: components to use instead of the naming's; leaves they don't cover are nameless.

    Raises:
        ValueError: if the naming lacks a name for one of our leaves.
    """
    partial = parts is not None
    parts = components(cfg, naming) if parts is None else parts
    ours = leaves(cfg)
    entries: dict[str, Entry] = {}
    shapes: dict[str, Shape] = {}
    nameless, unknown = [], []
    for path, leaf in ours.items():
        owners = [c for c in parts if path.startswith(c.ours)]
        owner = max(owners, key=lambda c: len(c.ours), default=None)
        try:
            found = list(owner.entries(path, leaf.shape)) if owner else []
        except KeyError:
            found = []
        if not found:
            spared = owner is not None and path.removeprefix(owner.ours).startswith(owner.nameless)
            (nameless if spared or partial else unknown).append(path)
        for entry in found:
            entries[entry.name] = entry
            shapes[entry.name] = entry.how.shape(_shape_at(leaf.shape, entry.at))
    if unknown:
        raise ValueError(f"The naming {naming!r} has no official name for {some(unknown)}.")
    return KeyMap(ours, entries, shapes, tuple(nameless))


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, for a sentence."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _shape_at(shape: Shape, at: tuple[Any, ...]) -> Shape:
    """Shape of ``x[at]`` for integers and full slices."""
    kept = [size for size, index in zip(shape, at) if isinstance(index, slice)]
    return (*kept, *shape[len(at) :])
