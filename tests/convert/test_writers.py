"""What lies beside exported weights in the official and the remote-code form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.text import train
from internvl_jax.convert import official, remote_code
from internvl_jax.convert.architectures import model_config
from internvl_jax.convert.formats import FORMATS, About, Files
from internvl_jax.convert.from_torch import WeightsError, load
from internvl_jax.convert.key_maps import key_map
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.tree import flatten

VIT = VitConfig(
    image_size=28, patch_size=7, width=20, depth=5, heads=5, mlp_dim=33, drop_path_mode="linear"
)
LLM = LlamaConfig(
    vocab_size=40, width=24, depth=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=30, eps=1e-5
)
TEXT = dataclasses.replace(LLM, cross_frequency=2, pad_id=0)
C = InternVLConfig(VIT, TEXT, 0, 5, 4)
G = dataclasses.replace(C, qllama=dataclasses.replace(TEXT, vision_width=20), queries=2)
CHAT = ChatConfig(VIT, LLM, projector="mlp1", unshuffle="v1", select_layer=-4)


def parsed(files: Files, name: str = "config.json") -> dict[str, Any]:
    content = files[name]
    assert isinstance(content, bytes)
    return json.loads(content)


@pytest.mark.parametrize("cfg", [C, G, VIT], ids=["C", "G", "tower"])
def test_the_official_config_is_read_back(cfg: Any) -> None:
    files = FORMATS["official"].files(About(cfg, stage={"image_size": 42}, dtype="bfloat16"))
    config = parsed(files)
    assert config["torch_dtype"] == "bfloat16"
    assert model_config(config) == (cfg, "hf")
    assert parsed(files, "preprocessor_config.json")["size"] == 42


def test_the_stage_1_config_is_read_back() -> None:
    found, naming = model_config(parsed(FORMATS["stage1"].files(About(C))))
    assert naming == "plain" and isinstance(found, InternVLConfig)
    assert key_map(found, "plain").shapes == key_map(C, "plain").shapes
    assert found.qllama == dataclasses.replace(C.qllama, head=False)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True},
    {"qkv_bias": True, "out_bias": True},
    {"qk_norm": True, "head_dim": 8, "rope_theta": 1e6},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_remote_code_config_is_read_back(options: dict[str, Any]) -> None:
    cfg = dataclasses.replace(CHAT, llm=dataclasses.replace(LLM, **options))
    config = parsed(FORMATS["remote-code"].files(About(cfg, data={"resize": "pad"})))
    assert model_config(config) == (cfg, "remote")
    assert config["ps_version"] == "v1" and config["select_layer"] == -4
    assert config["template"] == "vicuna_v1.1" and config["pad2square"] is True
    assert config["max_dynamic_patch"] == 1 and config["model_type"] == "internvl_chat"


def test_a_tied_head_is_written_as_a_copy() -> None:
    tied = dataclasses.replace(CHAT, llm=dataclasses.replace(LLM, tied_head=True))
    keys = key_map(tied, "remote")
    rng = np.random.default_rng(0)
    ours = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in keys.ours.items()}
    written = {name: keys.to_official(ours, name) for name in keys.entries}
    table = written["language_model.model.embed_tokens.weight"]
    head = written["language_model.lm_head.weight"]
    np.testing.assert_array_equal(head, table)
    assert not np.shares_memory(head, table)
    # Read as the same model, the copy is passed over.
    written["language_model.lm_head.weight"] = head + 1
    back = flatten(load(written, tied, "remote"))
    np.testing.assert_array_equal(back["llm/embedding"], ours["llm/embedding"])

    config = parsed(remote_code.files(About(tied)))
    assert config["llm_config"]["tie_word_embeddings"] is config["tie_word_embeddings"] is False
    untied, _ = model_config(config)
    assert key_map(untied, "remote").shapes == keys.shapes


def test_tokenizers_are_copied_and_their_ids_found(tmp_path: Path) -> None:
    path = tmp_path / "qwen.json"
    added = [
        {"content": name, "id": 30 + i}
        for i, name in enumerate(("<|endoftext|>", "<|im_end|>", "<IMG_CONTEXT>"))
    ]
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    files = remote_code.files(About(CHAT, tokenizer=path))
    assert files["tokenizer.json"] == path
    assert parsed(files)["img_context_token_id"] == 32
    assert parsed(files)["llm_config"]["eos_token_id"] == 31
    chosen = remote_code.files(About(CHAT, stage={"image_token_id": 30}, tokenizer=path))
    assert parsed(chosen)["img_context_token_id"] == 30

    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added[:2]}))
    with pytest.raises(WeightsError, match="no <IMG_CONTEXT> and no unknown token"):
        remote_code.files(About(CHAT, tokenizer=path))
    for broken in ("{", "[1]", '{"model": 3}', '{"added_tokens": [{}]}'):
        path.write_text(broken)
        with pytest.raises(WeightsError, match=r"qwen\.json cannot be read"):
            remote_code.files(About(CHAT, tokenizer=path))
    model = tmp_path / "tokenizer.model"
    train(["a red box and a blue one"] * 9, model, vocab_size=280)
    assert parsed(remote_code.files(About(CHAT, tokenizer=model)))["img_context_token_id"] == 0
    beyond = remote_code.files(About(CHAT, stage={"image_token_id": 999}, tokenizer=model))
    assert parsed(beyond)["img_context_token_id"] == 999
    (tmp_path / "added_tokens.json").write_text('{"<IMG_CONTEXT>": 301}')
    files = remote_code.files(About(CHAT, tokenizer=model))
    assert parsed(files)["img_context_token_id"] == 301
    assert {"tokenizer.model", "added_tokens.json", "tokenizer_config.json"} <= files.keys()
    with pytest.raises(WeightsError, match="is no tokenizer that is known here"):
        official.files(About(G, tokenizer=tmp_path / "vocab.txt"))


@pytest.mark.parametrize(
    ("form", "cfg", "says"),
    [
        ("official", CHAT, "hf-native, remote-code or plain"),
        ("remote-code", G, "as official or plain"),
        ("remote-code", ChatConfig(VIT, LLM), "the projector mlp2x_gelu"),
        ("remote-code", dataclasses.replace(CHAT, qllama=LLM, queries=2), "QLLaMA"),
        (
            "remote-code",
            dataclasses.replace(CHAT, llm=dataclasses.replace(LLM, out_bias=True)),
            "No decoder of transformers has",
        ),
    ],
)
def test_what_a_form_cannot_hold_is_a_sentence(form: str, cfg: Any, says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        FORMATS[form].files(About(cfg))
