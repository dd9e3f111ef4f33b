"""Adapters: merged at export, or alone as PEFT reads them; both ways the same model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.checkpoint import Checkpoints
from internvl_jax.convert.__main__ import main
from internvl_jax.convert.key_maps import key_map, leaves
from internvl_jax.convert.to_torch import export
from internvl_jax.models.adapters import without_adapters
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.nn.lora import LoraConfig, adapters
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage
from internvl_jax.stages.registry import stage_to_config
from internvl_jax.tree import unflatten

LORA = LoraConfig(rank=3, alpha=5.0)
VIT = VitConfig(image_size=16, patch_size=4, width=8, depth=2, heads=2, mlp_dim=12, lora=LORA)
TEXT = LlamaConfig(
    vocab_size=13, width=12, depth=3, heads=3, mlp_dim=7, cross_frequency=2, vision_width=8,
    lora=dataclasses.replace(LORA, rank=2, alpha=None),
)  # fmt: skip
G = InternVLConfig(VIT, TEXT, 3, 5, 4)
LLM = LlamaConfig(vocab_size=32, width=16, depth=2, heads=4, kv_heads=2, mlp_dim=12, lora=LORA)
CHAT = ChatConfig(vision=VIT, llm=LLM, projector="mlp1", unshuffle="v2")


def parameters(cfg: Any, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        p: np.asarray(rng.standard_normal(x.shape) * 0.3, np.float32 if "_lora" in p else dtype)
        for p, x in leaves(cfg).items()
    }


def tensors(folder: Path, start: str = "model") -> dict[str, np.ndarray]:
    files = sorted(folder.glob(f"{start}*.safetensors"))
    return {n: x for file in files for n, x in load_file(file).items()}


def by_hand(cfg: Any, params: dict[str, np.ndarray], naming: str) -> dict[str, np.ndarray]:
    """Official tensors with the adapters added in torch's own layout."""
    keys = key_map(without_adapters(cfg), naming)
    result = {n: keys.to_official(params, n).astype(np.float64) for n in keys.entries}
    for kernel, (a, b) in adapters(params).items():
        tower = getattr(cfg, kernel.split("/")[0])
        scale = (tower.lora.alpha or 2 * tower.lora.rank) / tower.lora.rank
        for e in keys.of(kernel):
            low = params[a] if e.row is None else params[a][e.row]
            high = (params[b] if e.row is None else params[b][e.row])[e.within]
            low, high = low.reshape(-1, low.shape[-1]), high.reshape(high.shape[0], -1)
            result[e.name] += scale * (low.astype(np.float64) @ high.astype(np.float64)).T
    return result


@pytest.mark.parametrize(
    ("cfg", "form", "naming"),
    [(G, "official", "hf"), (CHAT, "hf-native", "native"), (CHAT, "plain", "runtime")],
    ids=["stage 2", "hf-native", "plain"],
)
def test_merged_weights_are_the_kernels_and_their_adapters(
    cfg: Any, form: str, naming: str, tmp_path: Path
) -> None:
    params = parameters(cfg)
    export(params, cfg, tmp_path / "out", format=form)
    found, expected = tensors(tmp_path / "out"), by_hand(cfg, params, naming)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    assert sum(np.any(found[e] != by) for e, by in untouched(cfg, params, naming).items()) > 10


def untouched(cfg: Any, params: dict[str, np.ndarray], naming: str) -> dict[str, np.ndarray]:
    keys = key_map(without_adapters(cfg), naming)
    return {n: keys.to_official(params, n) for n in keys.entries}


def test_merging_into_bfloat16_rounds_once(tmp_path: Path) -> None:
    params = parameters(G, ml_dtypes.bfloat16)
    export(params, G, tmp_path / "out", dtype="float32")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    expected = by_hand(G, params, "hf")[name]
    np.testing.assert_allclose(tensors(tmp_path / "out")[name], expected, rtol=1e-5, atol=1e-6)


def run(folder: Path, stage: Any, params: dict[str, np.ndarray]) -> None:
    """A checkpoint as training with adapters leaves it."""
    state = {
        "params": unflatten({p: x for p, x in params.items() if stage.trainable(p)}),
        "frozen": unflatten({p: x for p, x in params.items() if not stage.trainable(p)}),
    }
    with Checkpoints(str(folder), async_=False) as manager:
        manager.save(7, state, {"stage": stage_to_config(stage)})


def test_adapters_alone_add_up_to_the_merged_model(tmp_path: Path) -> None:
    stage = GenerativeStage(
        model=G, text_length=8, image_size=16, trainable_paths=(".*_lora/", "query", "clip_proj")
    )
    params = parameters(G)
    run(tmp_path / "run", stage, params)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapters"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged, base = tensors(tmp_path / "merged"), untouched(G, params, "hf")
    alone = tensors(tmp_path / "out", "adapter_model")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {2, 3}
    for module in config["target_modules"]:
        pattern = next((p for p in config["rank_pattern"] if p.replace("\\", "") == module), None)
        rank = config["rank_pattern"].get(pattern, config["r"])
        alpha = config["alpha_pattern"].get(pattern, config["lora_alpha"])
        a, b = (alone.pop(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
        assert a.shape[0] == b.shape[1] == rank
        np.testing.assert_allclose(
            base.pop(f"{module}.weight") + alpha / rank * b @ a,
            merged.pop(f"{module}.weight"), rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    for name, x in alone.items():  # modules that were trained whole
        np.testing.assert_array_equal(x, merged[name.removeprefix("base_model.model.")])
    assert set(config["modules_to_save"]) == {
        n.removeprefix("base_model.model.").rpartition(".")[0] for n in alone
    }
    others = set(tensors(tmp_path / "out", "other_trained"))
    assert "query_tokens" in others and "clip_projector.cross_attn.q_bias" in others


def test_a_format_that_does_not_fit_names_those_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", FinetuneStage(model=CHAT, image_size=16), parameters(CHAT))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 78
    assert capsys.readouterr().err == (
        "The format 'official' cannot hold this model: use plain or hf-native or remote-code.\n"
    )


def test_a_run_without_adapters_has_none_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = without_adapters(G)
    run(
        tmp_path / "run",
        GenerativeStage(model=bare, text_length=8, image_size=16),
        parameters(bare),
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapters"]) == 78
    assert "This run trained no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_peft_itself_loads_them(tmp_path: Path) -> None:
    """On transformers' own class: base + adapters give the merged export's logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    stage = FinetuneStage(
        model=CHAT, text_length=64, image_size=16, trainable_paths=(".*_lora/", "projector/")
    )
    params = parameters(CHAT)
    run(tmp_path / "run", stage, params)
    bare = without_adapters(CHAT)
    base = {p: x for p, x in params.items() if p in leaves(bare)}
    export({p: np.zeros_like(x) if p.startswith("projector/") else x for p, x in base.items()},
           bare, tmp_path / "base", format="hf-native")  # fmt: skip
    form = ["--format", "hf-native"]
    arguments = ["export", str(tmp_path / "run")]
    assert main([*arguments, str(tmp_path / "adapters"), "--adapters", *form]) == 0
    assert main([*arguments, str(tmp_path / "merged"), *form]) == 0
    load = transformers.InternVLForConditionalGeneration.from_pretrained
    image_id = json.loads((tmp_path / "base" / "config.json").read_text())["image_token_id"]
    ids = torch.tensor([[1, image_id, image_id, image_id, image_id, 5, 6]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(tmp_path / "merged").eval()(**inputs).logits
        plain = load(tmp_path / "base").eval()
        before = plain(**inputs).logits
        tuned = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapters")).eval()
        found = tuned(**inputs).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 0.1
