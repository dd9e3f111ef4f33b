"""Names and shapes of every tensor, in both directions."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_jax.convert.from_torch import load
from internvl_jax.convert.key_maps import ModelConfig, key_map
from internvl_jax.models import presets
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.tree import flatten

TOWER = "model.vision_tower.vision_tower."
GLUE = "model.mm_projector."
SEVEN, THIRTEEN = presets.vicuna_7b(), presets.vicuna_13b()
# The true sizes: manifest, our config, naming, and which of the map's names the manifest lists.
TRUE_SIZES: list[tuple[str, ModelConfig, str, str]] = [
    ("InternVL-14B-224px", presets.internvl_14b_224(), "hf", ""),
    ("InternViT-6B-224px", presets.internvit_6b_224(), "hf", ""),
    ("InternViT-6B-448px-V1-0", presets.internvit_6b_448(), "hf", ""),
    ("internvl_c_13b_224px_pth", presets.internvl_c_13b_224(), "plain", ""),
    ("InternVL-Chat-ViT-6B-Vicuna-7B", presets.chat_vit_vicuna(SEVEN, 336), "llava", ""),
    ("InternVL-Chat-ViT-6B-Vicuna-13B", presets.chat_vit_vicuna(THIRTEEN, 336), "llava", ""),
    ("llava_internvl_14b_tower", presets.chat_qllama_vicuna(SEVEN), "llava", TOWER),
    ("llava_mm_projector_two_mlp_vicuna7b", presets.chat_qllama_vicuna(SEVEN), "llava", GLUE),
    ("llava_mm_projector_two_mlp_vicuna13b", presets.chat_qllama_vicuna(THIRTEEN), "llava", GLUE),
    ("llava_mm_projector_mlp2x_gelu_vit_vicuna7b", presets.chat_vit_vicuna(SEVEN), "llava", GLUE),
    (
        "llava_mm_projector_mlp2x_gelu_vit_vicuna13b",
        presets.chat_vit_vicuna(THIRTEEN),
        "llava",
        GLUE,
    ),
]
VIT = VitConfig(image_size=21, patch_size=7, width=20, depth=3, heads=5, mlp_dim=33)
LAYER_NORM = dataclasses.replace(VIT, norm="layer", qk_norm=False, qkv_bias=True)
LLAMA = LlamaConfig(vocab_size=13, width=12, depth=4, heads=3, mlp_dim=17)
QLLAMA = dataclasses.replace(LLAMA, depth=7, cross_frequency=3, vision_width=20, pad_id=0)
TEXT = dataclasses.replace(QLLAMA, vision_width=0)
QWEN = dataclasses.replace(
    LLAMA, kv_heads=1, head_dim=6, qkv_bias=True, out_bias=True, qk_norm=True
)
SMALL: dict[str, tuple[ModelConfig, str]] = {
    "vit": (VIT, "hf"),
    "vit 300m": (LAYER_NORM, "hf"),
    "vit native": (VIT, "native"),
    "vit 300m native": (LAYER_NORM, "native"),
    "vit plain": (VIT, "plain"),
    "llama": (LLAMA, "hf"),
    "all decoder options": (QWEN, "hf"),
    "tied head": (dataclasses.replace(LLAMA, tied_head=True), "hf"),
    "internvl g": (InternVLConfig(VIT, QLLAMA, 2, 5, 4), "hf"),
    "internvl c": (InternVLConfig(VIT, TEXT, 0, 5, 4), "hf"),
    "internvl c plain": (
        InternVLConfig(VIT, dataclasses.replace(TEXT, head=False), 0, 5, 4),
        "plain",
    ),
    "internvl, tail only": (
        InternVLConfig(VIT, dataclasses.replace(QLLAMA, depth=2), 2, 5, 4),
        "hf",
    ),
    "chat": (ChatConfig(VIT, LLAMA), "llava"),
    "chat with qllama": (ChatConfig(VIT, LLAMA, QLLAMA, 2), "llava"),
    "chat with queries only": (ChatConfig(VIT, LLAMA, QLLAMA, 2, "none"), "llava"),
    "chat native": (ChatConfig(VIT, LLAMA, projector="mlp1"), "native"),
    "chat native 300m, tied": (
        ChatConfig(LAYER_NORM, dataclasses.replace(LLAMA, tied_head=True), projector="mlp1"),
        "native",
    ),
    "internvl-chat": (ChatConfig(LAYER_NORM, QWEN, projector="mlp1"), "remote"),
}


@pytest.mark.parametrize(
    ("manifest", "cfg", "naming", "prefix"), TRUE_SIZES, ids=lambda x: str(x)[:40]
)
def test_true_sizes_equal_the_manifest(
    manifest: str, cfg: ModelConfig, naming: str, prefix: str
) -> None:
    packed = (Path(__file__).parent / "manifests" / f"{manifest}.json.gz").read_bytes()
    expected = {name: tuple(shape) for name, shape in json.loads(gzip.decompress(packed)).items()}
    shapes = {n: s for n, s in key_map(cfg, naming).shapes.items() if n.startswith(prefix)}
    assert shapes == expected


def test_the_14b_map_counts_every_parameter() -> None:
    cfg = presets.internvl_14b_224()
    shapes = key_map(cfg, "hf").shapes
    assert sum(int(np.prod(s, dtype=np.int64)) for s in shapes.values()) == cfg.param_count()
    assert cfg.param_count() == 13_834_975_747


def filled(cfg: ModelConfig, naming: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A map, and our leaves with a different number in every entry."""
    keys, start, leaves = key_map(cfg, naming), 0, {}
    for path, leaf in keys.ours.items():
        size = int(np.prod(leaf.shape))
        leaves[path] = np.arange(start, start + size, dtype=np.float32).reshape(leaf.shape)
        start += size
    return keys, leaves


@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_the_identity(name: str) -> None:
    cfg, naming = SMALL[name]
    keys, ours = filled(cfg, naming)
    assert keys.nameless == ()
    official = {n: keys.to_official(ours, n) for n in keys.entries}
    assert {n: x.shape for n, x in official.items()} == keys.shapes
    # Every number once: nothing is shared, nothing forgotten.
    numbers = np.concatenate([x.reshape(-1) for x in official.values()])
    assert len(numbers) == len(np.unique(numbers)) == sum(x.size for x in ours.values())
    back = flatten(load(official, cfg, naming))
    assert back.keys() == ours.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


def test_layers_are_where_the_model_reads_them() -> None:
    keys, ours = filled(*SMALL["internvl g"])
    # Layers 0, 3, 6 cross-attend; 6 is the tail.
    crossing = sorted(
        {int(n.split(".")[3]) for n in keys.entries if "cross_attn.norm1" in n and "layers" in n}
    )
    assert crossing == [0, 3, 6]
    at = {n: keys.entries[f"qllama.model.layers.{n}.mlp.up_proj.weight"] for n in range(7)}
    assert (at[3].path, at[3].at) == ("qllama/periods/layers/first/mlp/up", (1,))
    assert (at[5].path, at[5].at) == ("qllama/periods/layers/rest/1/mlp/up", (1,))
    assert (at[6].path, at[6].at) == ("qllama/tail/first/mlp/up", ())
    up = keys.to_official(ours, "qllama.model.layers.5.mlp.up_proj.weight")
    np.testing.assert_array_equal(up, ours["qllama/periods/layers/rest/1/mlp/up"][1].T)


def test_qkv_rows_are_all_q_then_all_k_then_all_v() -> None:
    keys, ours = filled(VIT, "hf")
    qkv = keys.to_official(ours, "encoder.layers.1.attn.qkv.weight")
    leaf = ours["blocks/layers/attn/qkv"][1]  # [D, 3, N, H]
    k_of_head_2 = qkv[VIT.width + 2 * 4 : VIT.width + 3 * 4]
    np.testing.assert_array_equal(k_of_head_2, leaf[:, 1, 2].T)


def test_a_patch_kernel_is_transposed_as_a_convolution() -> None:
    keys, ours = filled(VIT, "hf")
    kernel = keys.to_official(ours, "embeddings.patch_embedding.weight")
    leaf = ours["patch/kernel"]
    assert kernel[11, 2, 3, 6] == leaf[3, 6, 2, 11]


def test_what_a_naming_cannot_hold_is_listed() -> None:
    cfg = InternVLConfig(VIT, TEXT, 0, 5, 4, logit_bias=-10.0)
    assert key_map(cfg, "plain").nameless == ("logit_bias", "qllama/lm_head")
    assert key_map(cfg, "hf").nameless == ("logit_bias",)


@pytest.mark.parametrize(
    ("cfg", "naming"),
    [
        (VIT, "llava"),
        (LLAMA, "plain"),
        (InternVLConfig(VIT, QLLAMA, 2, 5, 4), "plain"),
        (ChatConfig(VIT, LLAMA, QLLAMA, 2, "mlp1"), "remote"),
        (ChatConfig(VIT, LLAMA, QLLAMA, 2, "mlp1"), "native"),
        (ChatConfig(VIT, LLAMA), "native"),
    ],
)
def test_a_naming_that_does_not_exist_is_refused(cfg: ModelConfig, naming: str) -> None:
    with pytest.raises(ValueError, match=f"The naming '{naming}' does not exist"):
        key_map(cfg, naming)
