"""Dialects of official weights, brought to one spelling; errors stay in the files' own words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from internvl_jax.convert import views
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.from_torch import Tensors, WeightsError, load
from internvl_jax.convert.key_maps import KeyMap, ModelConfig, key_map
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.tree import flatten

Weights = dict[str, np.ndarray]
VIT = VitConfig(image_size=28, patch_size=7, width=20, depth=2, heads=5, mlp_dim=33)
LLM = LlamaConfig(
    vocab_size=13, width=12, depth=2, heads=6, kv_heads=2, head_dim=2, mlp_dim=17, eps=1e-5
)
CHAT = ChatConfig(VIT, LLM, projector="mlp1")


def official(cfg: ModelConfig, naming: str) -> tuple[KeyMap, Weights, Weights]:
    """A map, random parameters of ours, and the same under the official names."""
    rng = np.random.default_rng(0)
    keys = key_map(cfg, naming)
    ours = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in keys.ours.items()}
    return keys, ours, {name: keys.to_official(ours, name) for name in keys.entries}


def internlm2(weights: Weights, prefix: str, cfg: LlamaConfig) -> Weights:
    """LLaMA's tensors as InternLM2 stores them: per key head its queries, its key, its value."""
    told = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    result: Weights = {}
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            result[name] = tensor
            continue
        if "q_proj" in name:
            k, v = (weights[name.replace("q_proj", f"{c}_proj")] for c in "kv")
            group, H = cfg.heads // cfg.K, cfg.H
            rows = []
            for head in range(cfg.K):
                rows += [tensor[(head * group + i) * H :][:H] for i in range(group)]
                rows += [k[head * H :][:H], v[head * H :][:H]]
            result[name.replace("self_attn.q_proj", "attention.wqkv")] = np.concatenate(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in told.items():
                name = name.replace(ours, theirs)
            result[name] = tensor
    return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a chat model"])
def test_internlm2_becomes_llama(inside: bool, bias: bool, tmp_path: Path) -> None:
    llm = dataclasses.replace(LLM, qkv_bias=bias, out_bias=bias)
    cfg = dataclasses.replace(CHAT, llm=llm) if inside else llm
    naming, prefix = ("remote", "language_model.") if inside else ("hf", "")
    keys, ours, weights = official(cfg, naming)
    save_file(internlm2(weights, prefix, llm), tmp_path / "model.safetensors")

    files = Tensors(tmp_path)
    assert f"{prefix}model.layers.1.attention.wqkv.weight" in files.shapes
    config: dict[str, Any] = {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": bias,
        "vocab_size": 13,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 17,
        "rms_norm_eps": 1e-5,
    }
    if inside:
        vision = {
            "hidden_size": 20,
            "num_attention_heads": 5,
            "num_hidden_layers": 2,
            "intermediate_size": 33,
            "patch_size": 7,
            "image_size": 224,  # the table is for 28
        }
        config = {"llm_config": config, "vision_config": vision, "ps_version": "v2"}
    found, spelled = model_config(config, files.shapes)
    assert spelled == naming and key_map(found, naming).shapes == keys.shapes
    named = views.of(files, found, naming)
    assert views.shapes(named) == keys.shapes
    views.check(named, keys.shapes)
    back = flatten(load(named, found, naming))
    assert back.keys() == ours.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


def test_errors_name_the_files_own_tensors() -> None:
    keys, _, weights = official(LLM, "hf")
    own = internlm2(weights, "", LLM)
    fused, up = "model.layers.0.attention.wqkv.weight", "model.layers.1.feed_forward.w3.weight"

    def told(edited: Weights) -> str:
        with pytest.raises(WeightsError) as error:
            views.check(views.of(edited, LLM, "hf"), keys.shapes)
        return str(error.value)

    assert f"lacks {fused}." in told({n: x for n, x in own.items() if n != fused})
    assert f"lacks {up}" in told({n: x for n, x in own.items() if n != up})
    assert f"misshapes {fused} (is [20, 11], should be [20, 12])" in told(
        {**own, fused: own[fused][:, :11]}
    )
    assert f"misshapes {fused} (is [18, 12], should be [20, 12] for 6 heads" in told(
        {**own, fused: own[fused][:18]}
    )
    assert "has the unknown lora.weight" in told({**own, "lora.weight": np.ones(2)})
    assert "output.weight (is [12, 12]" in told({**own, "output.weight": own["output.weight"][:12]})


def test_what_needs_no_translation_is_handed_through() -> None:
    _, _, weights = official(CHAT, "native")
    assert views.of(weights, CHAT, "native") is weights
    _, _, weights = official(VIT, "hf")
    assert views.of(weights, VIT, "hf") is weights


def in_memory(name: str) -> str:
    """A saved name -> the module's path in transformers' class."""
    name = name.replace("language_model.lm_head.", "lm_head.")
    name = name.replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head.") else f"model.{name}"


def test_both_native_spellings_are_read() -> None:
    keys, ours, weights = official(CHAT, "native")
    other = {in_memory(name): x for name, x in weights.items()}
    assert "model.vision_tower.embeddings.cls_token" in other and "lm_head.weight" in other
    named = views.of(other, CHAT, "native")
    views.check(named, keys.shapes)
    back = flatten(load(named, CHAT, "native"))
    for path, leaf in ours.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    other.pop("model.language_model.norm.weight")
    with pytest.raises(WeightsError, match=r"lacks model\.language_model\.norm\.weight"):
        views.check(views.of(other, CHAT, "native"), keys.shapes)


def test_a_tied_file_may_repeat_its_head() -> None:
    tied = dataclasses.replace(LLM, tied_head=True)
    keys, _, weights = official(tied, "hf")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    views.check(views.of(weights, tied, "hf"), keys.shapes)
    with pytest.raises(WeightsError, match=r"has the unknown lm_head\.weight"):
        views.check(weights, keys.shapes)


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 33,
            "image_size": [28, 28],
            "patch_size": [7, 7],
            "norm_type": "rms_norm",
            "use_qk_norm": True,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 13,
            "hidden_size": 12,
            "intermediate_size": 17,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = transformers.InternVLForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path)
    saved = Tensors(tmp_path)
    memory = {n: x.detach().numpy() for n, x in theirs.state_dict().items()}
    assert "vision_tower.embeddings.cls_token" in saved.shapes
    assert "model.vision_tower.embeddings.cls_token" in memory
    for tensors in (saved, memory):
        cfg, naming = model_config(config.to_dict(), views.shapes(tensors))
        assert isinstance(cfg, ChatConfig) and naming == "native" and cfg.llm.tied_head
        named, keys = views.of(tensors, cfg, naming), key_map(cfg, naming)
        views.check(named, keys.shapes)
        table = flatten(load(named, cfg, naming))["llm/embedding"]
        np.testing.assert_array_equal(table, memory["model.language_model.embed_tokens.weight"])
