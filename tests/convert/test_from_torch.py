"""Official files in: shards, dtypes, strictness, architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from internvl_jax.config import ConfigError
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.from_torch import Tensors, WeightsError, load
from internvl_jax.convert.key_maps import key_map
from internvl_jax.convert.official import official_config
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.tree import flatten

CFG = VitConfig(image_size=14, patch_size=7, width=8, depth=2, heads=2, mlp_dim=9)


@pytest.fixture
def official() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = key_map(CFG, "hf").shapes
    return {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}


def sharded(folder: Path, tensors: dict[str, np.ndarray], parts: int = 3) -> Path:
    names = sorted(tensors)
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::parts]}, folder / file)
        weight_map |= dict.fromkeys(names[i::parts], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_and_single_files_are_the_same(
    official: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_file(official, tmp_path / "one.safetensors")
    (tmp_path / "many").mkdir()
    one = flatten(load(tmp_path / "one.safetensors", CFG))
    many = flatten(load(sharded(tmp_path / "many", official), CFG))
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[p], many[p]) for p in one)
    assert np.array_equal(one["blocks/layers/ls1"][1], official["encoder.layers.1.ls1"])


def test_a_shard_that_the_index_lists_must_be_there(
    official: dict[str, np.ndarray], tmp_path: Path
) -> None:
    sharded(tmp_path, official)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks model-00002-of-00003\.safetensors"):
        load(tmp_path, CFG)


def test_a_tensor_in_two_files_is_refused(official: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_file(official, tmp_path / "a.safetensors")
    save_file(
        {"encoder.layers.0.ls1": official["encoder.layers.0.ls1"]}, tmp_path / "b.safetensors"
    )
    with pytest.raises(WeightsError, match=r"holds the tensor encoder\.layers\.0\.ls1 twice"):
        Tensors(tmp_path)


def test_bfloat16_is_read_as_it_is_or_widened(
    official: dict[str, np.ndarray], tmp_path: Path
) -> None:
    narrow = {n: x.astype(ml_dtypes.bfloat16) for n, x in official.items()}
    save_file(narrow, tmp_path / "w.safetensors")
    kept = flatten(load(tmp_path / "w.safetensors", CFG, dtype=None))
    wide = flatten(load(tmp_path / "w.safetensors", CFG))
    assert kept["cls"].dtype == ml_dtypes.bfloat16 and wide["cls"].dtype == np.float32
    assert np.array_equal(kept["cls"].astype(np.float32), wide["cls"])
    assert np.array_equal(
        wide["cls"], narrow["embeddings.class_embedding"][0, 0].astype(np.float32)
    )


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "module"])
def test_pickled_files_come_through_the_weights_only_loader(
    suffix: str, wrapper: str | None, official: dict[str, np.ndarray], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    state: Any = {n: torch.from_numpy(x.copy()) for n, x in official.items()}
    state["encoder.layers.0.ls1"] = state["encoder.layers.0.ls1"].bfloat16()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / f"w{suffix}")
    ours = flatten(load(tmp_path / f"w{suffix}", CFG))
    assert np.array_equal(ours["pos"], official["embeddings.position_embedding"][0])
    rounded = official["encoder.layers.0.ls1"].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(ours["blocks/layers/ls1"][0], rounded)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": Path("anything")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="cannot be read as plain weights"):
        Tensors(tmp_path / "w.pth")


def test_all_faults_are_in_one_sentence(official: dict[str, np.ndarray]) -> None:
    official.pop("embeddings.class_embedding")
    official["head.weight"] = np.zeros((3, 8), np.float32)
    official["encoder.layers.1.mlp.fc1.bias"] = np.zeros(10, np.float32)
    with pytest.raises(WeightsError) as caught:
        load(official, CFG)
    assert str(caught.value) == (
        "The mapping of weights does not fit the model: it lacks embeddings.class_embedding; it "
        "has the unknown head.weight; it misshapes encoder.layers.1.mlp.fc1.bias (is [10], should "
        "be [9])."
    )


def test_rotary_buffers_of_old_files_are_ignored() -> None:
    cfg = LlamaConfig(vocab_size=5, width=4, depth=1, heads=1, mlp_dim=3)
    tensors = {n: np.ones(s, np.float32) for n, s in key_map(cfg, "hf").shapes.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    assert flatten(load(tensors, cfg))["lm_head"].shape == (4, 5)


@pytest.mark.parametrize("make", ["nothing", "empty folder", "text"])
def test_what_is_no_weight_file(make: str, tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    if make == "empty folder":
        target.mkdir()
    elif make == "text":
        target.write_text("hello")
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        Tensors(target)


TEXT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
VISION = {"hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 6, "patch_size": 14}


def test_the_official_defaults_are_the_true_sizes() -> None:
    cfg, naming = model_config({"qllama_config": {"vocab_size": 49954}, "vision_config": {}})
    assert naming == "hf" and isinstance(cfg, InternVLConfig)
    assert cfg.param_count() == 13_834_975_747
    assert cfg.qllama.pad_id == 0 and cfg.vision.eps == 1e-6


@pytest.mark.parametrize(
    ("config", "kind", "naming", "expected"),
    [
        ({**VISION, "qk_normalization": False}, VitConfig, "hf", {"qk_norm": False, "width": 60}),
        (
            {"vision_config": {**VISION, "norm_type": "layer_norm"}},
            VitConfig,
            "hf",
            {"norm": "layer"},
        ),
        (
            {**TEXT, "model_type": "llama", "rope_theta": 5e5},
            LlamaConfig,
            "hf",
            {"rope_theta": 5e5, "K": 4},
        ),
        (
            {**TEXT, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2},
            LlamaConfig,
            "hf",
            {"qkv_bias": True, "out_bias": False, "K": 2},
        ),
        (
            {**TEXT, "model_type": "qwen3", "head_dim": 32},
            LlamaConfig,
            "hf",
            {"qk_norm": True, "H": 32},
        ),
        (
            {"llm_config": TEXT, "vision_config": VISION, "ps_version": "v2", "select_layer": -4},
            ChatConfig,
            "remote",
            {"projector": "mlp1", "unshuffle": "v2", "select_layer": -4},
        ),
        (
            {"llama_config": TEXT, "embed_dim": 90, "num_heads": 9, "depth": 2, "mlp_ratio": 1.5},
            InternVLConfig,
            "plain",
            {"queries": 0},
        ),
    ],
)
def test_architectures_are_recognised(
    config: dict[str, Any], kind: type, naming: str, expected: dict[str, Any]
) -> None:
    cfg, found = model_config(config)
    assert isinstance(cfg, kind) and found == naming
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, "belongs to no model of the family"),
        (
            {**TEXT, "architectures": ["MambaForCausalLM"]},
            "The decoder 'MambaForCausalLM' is unknown",
        ),
        ({**TEXT, "rope_scaling": {"factor": 2}}, "scaled rotary embeddings"),
        ({**TEXT, "hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({**VISION, "qk_normalization": True, "norm_type": "batch"}, "norm_type='batch'"),
        ({**VISION, "qk_normalization": True, "hidden_size": 61}, "not a multiple of"),
        ({**VISION, "qk_normalization": True, "image_size": [224, 448]}, "not square"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model_config(config)


@pytest.mark.parametrize("mlp_dim", [71, 150, 181, 12801])
@pytest.mark.parametrize("width", [45, 96, 97])
def test_exported_configs_are_read_back(mlp_dim: int, width: int) -> None:
    heads = {45: 5, 96: 4, 97: 1}[width]
    vision = VitConfig(28, 14, width, 2, heads, mlp_dim, qk_norm=False, qkv_bias=True)
    text = LlamaConfig(99, 24, 3, 2, 2, 12, mlp_dim=50, cross_frequency=2, pad_id=0)
    plain = InternVLConfig(vision, text, 0, 11, 1)
    both = InternVLConfig(
        vision,
        LlamaConfig(99, 24, 3, 2, 2, 12, 50, cross_frequency=2, vision_width=width, pad_id=0),
        queries=3,
        embed_dim=11,
        pool_heads=1,
    )
    for cfg, naming in ((plain, "plain"), (plain, "hf"), (both, "hf"), (vision, "hf")):
        again, found = model_config(json.loads(json.dumps(official_config(cfg, naming))))
        assert found == naming
        assert key_map(again, naming).shapes == key_map(cfg, naming).shapes
    again, _ = model_config(official_config(both, "hf"))
    assert isinstance(again, InternVLConfig)
    assert again.qllama == both.qllama and again.queries == 3
