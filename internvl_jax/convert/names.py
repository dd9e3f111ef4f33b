"""The official names, one table per module, and how an official tensor relates to our leaf.

A table says for each of our leaves (a slash path below its module) the official name and the
transform; both are read in both directions. `key_maps` puts the tables together to a whole model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from internvl_jax.convert.transpose import contiguous

Shape = tuple[int, ...]
# norm_type of the official configs -> ours.
NORMS = {"rms_norm": "rms", "layer_norm": "layer"}


@dataclasses.dataclass(frozen=True)
class Linear:
    """Ours [inputs..., outputs...] <-> torch's [out, in]; `inputs` of our axes are input axes."""

    inputs: int = 1

    def shape(self, ours: Shape) -> Shape:
        return math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])

    def to_official(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(math.prod(x.shape[: self.inputs]), -1).T

    def to_ours(self, x: np.ndarray, ours: Shape) -> np.ndarray:
        return contiguous(x.T).reshape(ours)


@dataclasses.dataclass(frozen=True)
class Conv:
    """Ours [height, width, in, out] <-> torch's [out, in, height, width]."""

    def shape(self, ours: Shape) -> Shape:
        return ours[3], ours[2], ours[0], ours[1]

    def to_official(self, x: np.ndarray) -> np.ndarray:
        return x.transpose(3, 2, 0, 1)

    def to_ours(self, x: np.ndarray, ours: Shape) -> np.ndarray:
        return x.transpose(2, 3, 1, 0)


@dataclasses.dataclass(frozen=True)
class Flat:
    """Ours [heads, head_dim] and the like <-> one long vector."""

    def shape(self, ours: Shape) -> Shape:
        return (math.prod(ours),)

    def to_official(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(-1)

    def to_ours(self, x: np.ndarray, ours: Shape) -> np.ndarray:
        return x.reshape(ours)


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array, but for `ones` leading axes of length one on the official side."""

    ones: int = 0

    def shape(self, ours: Shape) -> Shape:
        return (1,) * self.ones + ours

    def to_official(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.shape(x.shape))

    def to_ours(self, x: np.ndarray, ours: Shape) -> np.ndarray:
        return x.reshape(ours)


Transform = Linear | Conv | Flat | Same
LINEAR, CONV, FLAT, SAME = Linear(), Conv(), Flat(), Same()


@dataclasses.dataclass(frozen=True)
class Part:
    """An official tensor that holds a part of our leaf: `at` indexes the leaf (of one layer).

    A `copy` repeats what another part of the leaf holds: it is written, but never read.
    """

    name: str
    how: Transform
    at: tuple[Any, ...] = ()
    copy: bool = False


Names = Mapping[str, "Part | tuple[Part, ...]"]


def _both(ours: str, name: str, how: Transform = LINEAR) -> dict[str, Part]:
    """A matrix and its bias."""
    return {ours: Part(f"{name}.weight", how), f"{ours}_bias": Part(f"{name}.bias", FLAT)}


def _norm(ours: str, name: str) -> dict[str, Part]:
    return {
        f"{ours}/scale": Part(f"{name}.weight", FLAT),
        f"{ours}/bias": Part(f"{name}.bias", FLAT),
    }


# The tables. Leaves that a configuration does not have (biases, norms) are simply not asked for.

VIT: Names = {
    "patch/kernel": Part("embeddings.patch_embedding.weight", CONV),
    "patch/bias": Part("embeddings.patch_embedding.bias", SAME),
    "cls": Part("embeddings.class_embedding", Same(2)),
    "pos": Part("embeddings.position_embedding", Same(1)),
}
VIT_LAYER: Names = {
    **_norm("norm1", "norm1"),
    **_both("attn/qkv", "attn.qkv"),
    **_norm("attn/q_norm", "attn.q_norm"),
    **_norm("attn/k_norm", "attn.k_norm"),
    **_both("attn/out", "attn.proj", Linear(2)),
    "ls1": Part("ls1", SAME),
    **_norm("norm2", "norm2"),
    **_both("mlp/fc1", "mlp.fc1"),
    **_both("mlp/fc2", "mlp.fc2"),
    "ls2": Part("ls2", SAME),
}
VIT_PLAIN: Names = {
    "patch/kernel": Part("patch_embed.proj.weight", CONV),
    "patch/bias": Part("patch_embed.proj.bias", SAME),
    "cls": Part("cls_token", Same(2)),
    "pos": Part("pos_embed", Same(1)),
}
VIT_PLAIN_LAYER: Names = {
    **VIT_LAYER,
    "ls1": Part("ls1.gamma", SAME),
    "ls2": Part("ls2.gamma", SAME),
}
# transformers' own InternVLVisionModel.
VIT_NATIVE: Names = {
    "patch/kernel": Part("embeddings.patch_embeddings.projection.weight", CONV),
    "patch/bias": Part("embeddings.patch_embeddings.projection.bias", SAME),
    "cls": Part("embeddings.cls_token", Same(2)),
    "pos": Part("embeddings.position_embeddings", Same(1)),
}
VIT_NATIVE_LAYER: Names = {
    **_norm("norm1", "layernorm_before"),
    "attn/qkv": tuple(
        Part(f"attention.{c}_proj.weight", LINEAR, (slice(None), i)) for i, c in enumerate("qkv")
    ),
    "attn/qkv_bias": tuple(
        Part(f"attention.{c}_proj.bias", FLAT, (i,)) for i, c in enumerate("qkv")
    ),
    **_norm("attn/q_norm", "attention.q_norm"),
    **_norm("attn/k_norm", "attention.k_norm"),
    **_both("attn/out", "attention.projection_layer", Linear(2)),
    "ls1": Part("lambda_1", SAME),
    **_norm("norm2", "layernorm_after"),
    **_both("mlp/fc1", "mlp.fc1"),
    **_both("mlp/fc2", "mlp.fc2"),
    "ls2": Part("lambda_2", SAME),
}
LLAMA: Names = {
    "embedding": Part("model.embed_tokens.weight", SAME),
    **_norm("norm", "model.norm"),
    "lm_head": Part("lm_head.weight", LINEAR),
}
# A head that shares the embedding's table, spelled out for those who expect a tensor of its own.
LLAMA_COPIED_HEAD: Names = {
    **LLAMA,
    "embedding": (
        Part("model.embed_tokens.weight", SAME),
        Part("lm_head.weight", SAME, copy=True),
    ),
}
LLAMA_LAYER: Names = {
    **_norm("norm1", "input_layernorm"),
    **_both("attn/q", "self_attn.q_proj"),
    **_both("attn/k", "self_attn.k_proj"),
    **_both("attn/v", "self_attn.v_proj"),
    **_both("attn/out", "self_attn.o_proj", Linear(2)),
    **_norm("attn/q_norm", "self_attn.q_norm"),
    **_norm("attn/k_norm", "self_attn.k_norm"),
    **_norm("cross/norm1", "cross_attn.norm1"),
    **_norm("cross/norm2", "cross_attn.norm2"),
    "cross/q": Part("cross_attn.q_proj.weight", LINEAR),
    "cross/k": Part("cross_attn.k_proj.weight", LINEAR),
    "cross/v": Part("cross_attn.v_proj.weight", LINEAR),
    "cross/out": Part("cross_attn.o_proj.weight", Linear(2)),
    **_norm("norm2", "post_attention_layernorm"),
    "mlp/gate": Part("mlp.gate_proj.weight", LINEAR),
    "mlp/up": Part("mlp.up_proj.weight", LINEAR),
    "mlp/down": Part("mlp.down_proj.weight", LINEAR),
}
# The plain stage-1 file keeps the decoder alone: it has no place for an output head.
LLAMA_PLAIN: Names = {
    "embedding": Part("transformer.embed_tokens.weight", SAME),
    **_norm("norm", "transformer.norm"),
}
POOL: Names = {
    **_norm("norm_q", "norm1_q"),
    **_norm("norm_k", "norm1_k"),
    **_norm("norm_v", "norm1_v"),
    "q": Part("cross_attn.q.weight", LINEAR),
    "k": Part("cross_attn.k.weight", LINEAR),
    "v": Part("cross_attn.v.weight", LINEAR),
    "q_bias": Part("cross_attn.q_bias", FLAT),
    "k_bias": Part("cross_attn.k_bias", FLAT),
    "v_bias": Part("cross_attn.v_bias", FLAT),
    **_both("out", "cross_attn.proj", Linear(2)),
}
HEADS: Names = {
    "query_tokens": Part("query_tokens", Same(1)),
    "text_projection": Part("text_projection", SAME),
    "logit_scale": Part("logit_scale", SAME),
    "itm_head": Part("itm_head.weight", LINEAR),
    "itm_bias": Part("itm_head.bias", SAME),
}
MLP2X: Names = {**_both("fc1", "0"), **_both("fc2", "2")}
MLP1: Names = {
    **_norm("norm", "0"),
    **{f"mlp/{k}": v for k, v in (_both("fc1", "1") | _both("fc2", "3")).items()},
}
# transformers' own projector of InternVLForConditionalGeneration.
MLP1_NATIVE: Names = {
    **_norm("norm", "layer_norm"),
    **_both("mlp/fc1", "linear_1"),
    **_both("mlp/fc2", "linear_2"),
}
