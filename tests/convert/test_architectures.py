"""Which model a folder is: by its config and names, never by a flag."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from internvl_jax.config import ConfigError
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.key_maps import key_map
from internvl_jax.models import presets
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

Shapes = dict[str, tuple[int, ...]]
TOWER = "model.vision_tower."
# Vicuna v1.5, which the LLaVA-style models begin from.
SEVEN = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
THIRTEEN = {
    **SEVEN,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "intermediate_size": 13824,
}
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": "OpenGVLab/InternViT-6B-224px",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -4,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 3200,
}
TEXT = {"hidden_size": 16, "num_attention_heads": 4, "vocab_size": 30, "num_hidden_layers": 2}
VISION = {"hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 4, "image_size": 28}


def manifest(name: str) -> Shapes:
    """Every tensor of a published model."""
    packed = (Path(__file__).parent / "manifests" / f"{name}.json.gz").read_bytes()
    return {name: tuple(shape) for name, shape in json.loads(gzip.decompress(packed)).items()}


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("internvl_c_13b_224px_pth", "plain"),
        ("InternVL-14B-224px", "hf"),
        ("InternViT-6B-224px", "hf"),
        ("InternViT-6B-448px-V1-0", "hf"),
    ],
)
def test_files_without_a_config(name: str, naming: str) -> None:
    names = manifest(name)
    cfg, found = model_config(None, names)
    assert found == naming
    assert key_map(cfg, naming).shapes == names


def test_what_shapes_do_not_show_is_the_published_models() -> None:
    assert model_config(None, manifest("InternVL-14B-224px"))[0] == presets.internvl_14b_224()
    assert model_config(None, manifest("InternViT-6B-448px-V1-0"))[0] == presets.internvit_6b_448()


def test_internvit_v1_2_has_45_layers() -> None:
    names = manifest("InternViT-6B-448px-V1-0")
    dropped = tuple(f"encoder.layers.{n}." for n in (45, 46, 47))
    cfg, _ = model_config(None, {n: s for n, s in names.items() if not n.startswith(dropped)})
    assert isinstance(cfg, VitConfig) and cfg.depth == 45
    assert cfg.param_count() == 5_536_496_000


def test_a_stage_1_file_has_the_layout_that_stage_2_begins_from() -> None:
    cfg, _ = model_config(None, manifest("internvl_c_13b_224px_pth"))
    ours, preset = key_map(cfg, "plain").ours, key_map(presets.internvl_c_13b_224(), "plain").ours
    assert {*preset} - {*ours} == {"qllama/lm_head"} and not {*ours} - {*preset}
    assert isinstance(cfg, InternVLConfig)
    assert (cfg.vision.heads, cfg.qllama.heads, cfg.pool_heads) == (25, 32, 16)


def test_internvit_300m_without_a_config() -> None:
    expected = presets.internvit_300m_448()
    assert model_config(None, key_map(expected, "hf").shapes) == (expected, "hf")
    assert model_config(None, key_map(expected, "native").shapes) == (expected, "native")


@pytest.mark.parametrize(("size", "text"), [("7B", SEVEN), ("13B", THIRTEEN)])
def test_llava_style_with_its_tower_inside(size: str, text: dict[str, Any]) -> None:
    names = manifest(f"InternVL-Chat-ViT-6B-Vicuna-{size}")
    cfg, naming = model_config({**text, **LLAVA}, names)
    assert naming == "llava" and key_map(cfg, naming).shapes == names
    assert isinstance(cfg, ChatConfig)
    # The file's 577 positions win over the 257 of the tower that the config names.
    assert (cfg.vision.image_size, cfg.select_layer, cfg.projector) == (336, -4, "mlp2x_gelu")


@pytest.mark.parametrize(("size", "text"), [("7b", SEVEN), ("13b", THIRTEEN)])
def test_llava_style_with_both_projectors(size: str, text: dict[str, Any]) -> None:
    whole = manifest(f"InternVL-Chat-ViT-6B-Vicuna-{size.upper()}")
    llm = {n: s for n, s in whole.items() if not n.startswith((TOWER, "model.mm_projector."))}
    names = (
        llm
        | manifest("llava_internvl_14b_tower")
        | manifest(f"llava_mm_projector_two_mlp_vicuna{size}")
    )
    config = {**text, **LLAVA, "mm_projector_type": "two_mlp", "mm_vision_tower": "internvl_14b"}
    cfg, naming = model_config(config, names)
    assert naming == "llava" and key_map(cfg, naming).shapes == names
    assert isinstance(cfg, ChatConfig) and cfg.queries == 96


@pytest.mark.parametrize(
    ("tower", "projector", "image_size", "depth", "queries"),
    [
        ("OpenGVLab/InternViT-6B-224px", "mlp2x_gelu", 224, 48, 0),
        ("./pretrained/intern_vit_6b_448px", "mlp2x_gelu", 448, 48, 0),
        ("OpenGVLab/InternViT-6B-448px-V1-5", "mlp2x_gelu", 448, 45, 0),
        ("OpenGVLab/InternVL-14B-224px", "two_mlp", 224, 48, 96),
    ],
)
def test_llava_style_with_a_tower_that_is_only_named(
    tower: str, projector: str, image_size: int, depth: int, queries: int
) -> None:
    whole = manifest("InternVL-Chat-ViT-6B-Vicuna-7B")
    names = {n: s for n, s in whole.items() if not n.startswith(TOWER)}
    if queries:
        names = {n: s for n, s in names.items() if not n.startswith("model.mm_projector.")}
        names |= manifest("llava_mm_projector_two_mlp_vicuna7b")
    config = {**SEVEN, **LLAVA, "mm_vision_tower": tower, "mm_projector_type": projector}
    cfg, naming = model_config(config, names)
    assert isinstance(cfg, ChatConfig)
    assert (cfg.vision.image_size, cfg.vision.depth, cfg.queries) == (image_size, depth, queries)
    keys = key_map(cfg, naming)
    assert naming == "llava-without-tower" and keys.shapes == names
    assert {p.split("/")[0] for p in keys.nameless} == (
        {"vision", "qllama", "query_tokens"} if queries else {"vision"}
    )


def test_the_same_model_type_means_two_models() -> None:
    said = {"model_type": "internvl", "vision_config": VISION}
    cfg, naming = model_config({**said, "qllama_config": TEXT})
    assert isinstance(cfg, InternVLConfig) and naming == "hf"
    cfg, naming = model_config({**said, "text_config": TEXT})
    assert isinstance(cfg, ChatConfig) and naming == "native"


def test_a_position_table_wins_over_the_config() -> None:
    config = {"model_type": "intern_vit_6b", "image_size": 224}
    cfg, _ = model_config(config, {"embeddings.position_embedding": (1, 577, 3200)})
    assert isinstance(cfg, VitConfig) and cfg.image_size == 336
    with pytest.raises(ConfigError, match="has 578 rows, which is no square"):
        model_config(config, {"embeddings.position_embedding": (1, 578, 3200)})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["InternLMForCausalLM"]}, {"qkv_bias": True, "out_bias": True}),
        (
            {
                "architectures": ["InternLM2ForCausalLM"],
                "bias": False,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
            {"qkv_bias": False, "out_bias": False},
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, {"qk_norm": True, "qkv_bias": False}),
        ({"architectures": ["LLaMAForCausalLM"], "pad_token_id": -1}, {"pad_id": None}),
    ],
)
def test_decoders(config: dict[str, Any], expected: dict[str, Any]) -> None:
    cfg, naming = model_config({**TEXT, **config})
    assert isinstance(cfg, LlamaConfig) and naming == "hf"
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize("embedding", ["model.embed_tokens.weight", "model.tok_embeddings.weight"])
def test_an_extended_vocabulary_is_the_embedding_s(embedding: str) -> None:
    names: Shapes = {embedding: (33, 16), "output.weight": (33, 16)}
    cfg, _ = model_config({**TEXT, "model_type": "llama", "pad_token_id": 32}, names)
    assert isinstance(cfg, LlamaConfig)
    assert (cfg.vocab_size, cfg.pad_id, cfg.tied_head) == (33, 32, False)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [({}, {}, True), ({}, {"tie_word_embeddings": False}, False)]
    + [
        ({"tie_word_embeddings": tie}, {"tie_word_embeddings": not tie}, tie)
        for tie in (True, False)
    ],
)
def test_native_tie_flags(outer: dict[str, Any], inner: dict[str, Any], tied: bool) -> None:
    config = {"text_config": {**TEXT, **inner}, "vision_config": VISION, **outer}
    cfg, _ = model_config(config)
    assert isinstance(cfg, ChatConfig) and cfg.llm.tied_head is tied


@pytest.mark.parametrize(("layer", "expected"), [(-1, -1), (-4, -4), (1, -4), ([4], -1)])
def test_native_feature_layer_counts_the_embeddings(layer: Any, expected: int) -> None:
    config = {"text_config": TEXT, "vision_config": VISION, "vision_feature_layer": layer}
    cfg, _ = model_config(config)
    assert isinstance(cfg, ChatConfig) and cfg.select_layer == expected
    assert (cfg.projector, cfg.unshuffle) == ("mlp1", "v2")


NATIVE = {"text_config": TEXT, "vision_config": VISION}


@pytest.mark.parametrize(
    ("config", "names", "says"),
    [
        (None, {"layers.0.weight": (3, 3)}, "There is no config.json"),
        (
            None,
            {"embeddings.position_embedding": (1, 5, 12)}
            | {"embeddings.patch_embedding.weight": (12, 3, 7, 7)},
            "width 12 is none of the published ones",
        ),
        (None, {"embeddings.position_embedding": (1, 5, 12)}, "The weights lack embeddings.patch"),
        ({**SEVEN, **LLAVA, "mm_vision_tower": "openai/clip"}, {}, "neither an InternViT-6B nor"),
        ({**SEVEN, **LLAVA, "mm_projector_type": "linear"}, {}, "mm_projector_type='linear'"),
        ({**SEVEN, "model_type": "llava", "mm_vision_tower": "InternViT-6B"}, {}, "type='linear'"),
        ({**SEVEN, **LLAVA, "mm_vision_select_feature": "cls_patch"}, {}, "only 'patch'"),
        ({**NATIVE, "vision_feature_layer": [-1, -2]}, {}, "names several layers"),
        ({**NATIVE, "vision_feature_select_strategy": "full"}, {}, "select_strategy='full'"),
        ({**NATIVE, "vision_config": {"use_mean_pooling": False}}, {}, "use_mean_pooling=False"),
        ({**TEXT, "use_sliding_window": True}, {}, "use_sliding_window=True"),
        ({**TEXT, "rope_parameters": {"rope_type": "yarn"}}, {}, "rope_scaling is 'yarn'"),
    ],
)
def test_what_is_not_known_is_a_sentence(config: Any, names: Shapes, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        model_config(config, names)
    assert "\n" not in str(error.value)
