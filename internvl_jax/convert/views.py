"""Weights under other names than their files': a decoder's and a dialogue model's dialects.

`key_maps` has one table per naming. What is spelled differently, or fused differently, is brought
to that naming here while it is read, tensor by tensor; errors still name the files' own tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.convert.from_torch import WeightsError, shapes
from internvl_jax.convert.from_torch import check as check_shapes
from internvl_jax.convert.key_maps import ModelConfig
from internvl_jax.convert.names import Shape
from internvl_jax.models.llama import LlamaConfig

# InternLM2's spelling -> LLaMA's.
INTERNLM2 = {
    "model.tok_embeddings.": "model.embed_tokens.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
}
FUSED = ".attention.wqkv."
_HEAD = re.compile(r"^(language_model\.)?(output|lm_head)\.weight$")
_QKV = re.compile(r"\.self_attn\.[qkv]_proj\.")
# transformers' InternVLForConditionalGeneration in memory -> as it saves itself.
IN_MEMORY = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a view: which one of the files' holds it, its shape, and how it is cut out."""

    own: str
    shape: Shape
    cut: Callable[[np.ndarray], np.ndarray] | None = None


class View(Mapping[str, np.ndarray]):
    """Tensors under other names, read one at a time.

    Attributes:
        source: the files, for messages.
        shapes: name -> shape.
    """

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        pieces: Mapping[str, Piece],
        own: Callable[[str], str],
    ):
        """Wraps `tensors`; `own` says how the files would spell any name, there or not."""
        self.source: Path | str = getattr(tensors, "source", "The mapping of weights")
        self.shapes: dict[str, Shape] = {name: piece.shape for name, piece in pieces.items()}
        self._tensors, self._pieces, self._own = tensors, pieces, own

    def __getitem__(self, name: str) -> np.ndarray:
        piece = self._pieces[name]
        tensor = self._tensors[piece.own]
        return tensor if piece.cut is None else piece.cut(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def own(self, name: str) -> str:
        """The files' own name of what is called `name` here."""
        name = self._own(name)
        return self._tensors.own(name) if isinstance(self._tensors, View) else name


def of(tensors: Mapping[str, np.ndarray], cfg: ModelConfig, naming: str) -> Mapping[str, Any]:
    """The tensors under the names of `key_maps`, whatever dialect the files are written in.

    Args:
        tensors: the files' (`from_torch.Tensors`), or any mapping of names to arrays.
        cfg, naming: the model and its naming, from `architectures.model_config`.

    Returns:
        The same object where it needs no translation, else a `View` of it.

    Raises:
        WeightsError: if a fused tensor does not have the rows that the config asks for.
    """
    llm = cfg if isinstance(cfg, LlamaConfig) else getattr(cfg, "llm", None)
    found = shapes(tensors)
    if naming == "native" and any(n.startswith("model.vision_tower.") for n in found):
        tensors = _renamed(tensors, native_name, in_memory_name)
    if llm is not None and any(FUSED in n for n in found):
        tensors = _internlm2(tensors, llm)
    if llm is not None and llm.tied_head and naming != "remote":
        # transformers reads no head of its own where the config ties it; old files repeat it.
        heads = [n for n in shapes(tensors) if n.endswith("lm_head.weight")]
        kept = {n: Piece(n, s) for n, s in shapes(tensors).items() if n not in heads}
        tensors = View(tensors, kept, lambda name: name) if heads else tensors
    return tensors


def check(tensors: Mapping[str, Any], expected: Mapping[str, Shape]) -> None:
    """Compares names and shapes in both directions, in the files' own words.

    Args:
        tensors: what `of` returned.
        expected: `KeyMap.shapes`.

    Raises:
        WeightsError: one sentence that names what is missing, extra or misshapen.
    """
    where = getattr(tensors, "source", "The mapping of weights")
    check_shapes(_own(tensors, shapes(tensors)), _own(tensors, expected), where)


def _own(tensors: Mapping[str, Any], named: Mapping[str, Shape]) -> dict[str, Shape]:
    """The files' own names and shapes of what has the given ones here."""
    result: dict[str, Shape] = {}
    for name, shape in named.items():
        own = tensors.own(name) if isinstance(tensors, View) else name
        rows = result[own][0] if own in result else 0  # parts of a fused tensor add up
        result[own] = (rows + shape[0], *shape[1:]) if shape else shape
    return result


def native_name(name: str) -> str:
    """A tensor of InternVLForConditionalGeneration in memory -> as it is saved."""
    return _translated(name, IN_MEMORY, start=True)


def in_memory_name(name: str) -> str:
    """The inverse of `native_name`: as the modules of the loaded class are called."""
    return _translated(name, {saved: own for own, saved in IN_MEMORY.items()}, start=True)


def llama_name(name: str) -> str:
    """A tensor of InternLM2 -> LLaMA's name; the fused one and strange ones stay."""
    if _HEAD.match(name):
        return name.replace("output.", "lm_head.")
    return _translated(name, INTERNLM2)


def _internlm2_name(name: str) -> str:
    if _HEAD.match(name):
        return name.replace("lm_head.", "output.")
    return _translated(_QKV.sub(FUSED, name), {llama: own for own, llama in INTERNLM2.items()})


def _translated(name: str, table: Mapping[str, str], start: bool = False) -> str:
    for old, new in table.items():
        if name.startswith(old) if start else old in name:
            return name.replace(old, new, 1)
    return name


def _renamed(
    tensors: Mapping[str, Any], to: Callable[[str], str], back: Callable[[str], str]
) -> View:
    pieces = {to(name): Piece(name, shape) for name, shape in shapes(tensors).items()}
    return View(tensors, pieces, back)


def _internlm2(tensors: Mapping[str, Any], cfg: LlamaConfig) -> View:
    """Splits the fused [K, (g + 2) * H, D]: each key head's g queries, then its key, its value."""
    K, H, g = cfg.K, cfg.H, cfg.heads // cfg.K
    rows = K * (g + 2) * H
    pieces: dict[str, Piece] = {}
    for name, shape in shapes(tensors).items():
        if FUSED not in name:
            pieces[llama_name(name)] = Piece(name, shape)
            continue
        if shape[0] != rows:
            raise WeightsError(
                f"{getattr(tensors, 'source', 'The mapping')} misshapes {name} (is {list(shape)}, "
                f"should be {[rows, *shape[1:]]} for {cfg.heads} heads and {K} key heads of {H})."
            )
        for letter, first, last in (("q", 0, g), ("k", g, g + 1), ("v", g + 1, g + 2)):
            part = name.replace(FUSED, f".self_attn.{letter}_proj.")
            count = K * (last - first) * H
            pieces[part] = Piece(name, (count, *shape[1:]), _cut(K, H, first, last))
    return View(tensors, pieces, _internlm2_name)


def _cut(K: int, H: int, first: int, last: int) -> Callable[[np.ndarray], np.ndarray]:
    def cut(fused: np.ndarray) -> np.ndarray:
        rest = fused.shape[1:]
        return fused.reshape(K, -1, H, *rest)[:, first:last].reshape(-1, *rest)

    return cut
