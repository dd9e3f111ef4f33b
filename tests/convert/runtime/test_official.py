"""The runtime computes what the official models computed, from their own weight files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvl_jax.convert.case import Case
from internvl_jax.convert.formats import About
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig

torch = pytest.importorskip("torch")

from internvl_jax.convert.runtime.load import load  # noqa: E402
from tests.convert.runtime.conftest import close, tensors, write  # noqa: E402


def compare_towers(case: Case, model: Any, mode: str) -> None:
    """Features and logits of one mode with what is stored."""
    text = torch.tensor(case.inputs["text"]).long()
    vision = model.image_tokens(pixels(case))
    image = model.image_embedding(vision, mode)
    embedded = model.text_embedding(text, (text > 0).sum(1))
    close(image, case.outputs["image_features_raw"])
    close(embedded, case.outputs["text_features_raw"])
    close(model.similarity(image, embedded), case.outputs["logits_per_image"])
    if "query_hidden" in case.outputs:
        close(model.query_states(vision), case.outputs["query_hidden"])


def pixels(case: Case) -> Any:
    return torch.tensor(case.inputs["pixel_values"]).permute(0, 2, 3, 1)


def test_stage_1(packed: ModuleType, tmp_path: Path) -> None:
    case = Case.read(packed.unpack("internvl_c_pytorch", tmp_path))
    cfg = case.architecture[0]
    folder = write(tmp_path / "out", tensors(case.model(), cfg), About(cfg))
    compare_towers(case, load(folder, device="cpu")[1], "C")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["C", "G"])
def test_both_modes(mode: str, reference_root: Path, tmp_path: Path) -> None:
    case = Case.read(reference_root / f"internvl_{mode.lower()}")
    cfg = case.architecture[0]
    weights = load_file(case.folder / "weights.safetensors")
    folder = write(tmp_path / "out", weights, About(cfg))
    compare_towers(case, load(folder, device="cpu")[1], mode)


def test_language_model_on_queries_and_text(packed: ModuleType, tmp_path: Path) -> None:
    """The official file's names are the runtime's."""
    case = Case.read(packed.unpack("qllama_lm", tmp_path))
    cfg = case.architecture[0]
    weights = load_file(case.folder / "weights.safetensors")
    model: Any = load(write(tmp_path / "out", weights, About(cfg)), device="cpu")[1]
    ids = torch.tensor(case.inputs["input_ids"]).long()
    mask = torch.tensor(case.inputs["attention_mask"]) != 0
    vision = model.image_tokens(pixels(case))
    close(vision, case.outputs["image_tokens"])
    # What the last prompt token predicts, of each row cut where its text ends.
    for row, length in enumerate(mask.sum(1).tolist()):
        cut = ids[row : row + 1, :length]
        begun = model.read(pixels(case)[row : row + 1], cut, torch.ones_like(cut, dtype=torch.bool))
        expected = case.outputs["logits"][row, cfg.queries + length - 1]
        close(begun.logits[0], expected)


@pytest.mark.parametrize("output", ["two_mlp_out", "mlp_vit_out", "mlp_query_out"])
def test_dialogue_models_vision_side(output: str, packed: ModuleType, tmp_path: Path) -> None:
    case = Case.read(packed.unpack("chat_features", tmp_path))
    tower, width = case.architecture[0], case.config["chat"]["llm_hidden"]
    queries, projector, names = {
        "two_mlp_out": (True, "mlp2x_gelu", ("two_mlp.mlp1.", "two_mlp.mlp2.")),
        "mlp_vit_out": (False, "mlp2x_gelu", ("mlp_vit.", "-")),
        "mlp_query_out": (True, "none", ("-", "mlp_query.")),
    }[output]
    cfg = ChatConfig(
        vision=tower.vision,
        qllama=tower.qllama if queries else None,
        queries=tower.queries if queries else 0,
        llm=LlamaConfig(vocab_size=1, width=width, depth=0, heads=1, mlp_dim=1, head=False),
        projector=projector,
        select_layer=case.config["chat"]["mm_vision_select_layer"],
    )
    ours = dict(zip((*names, "tower."), ("projector.", "query_projector.", "")))
    weights = {
        "language_model.model.embed_tokens.weight": np.zeros((1, width), np.float32),
        "language_model.model.norm.weight": np.zeros(width, np.float32),
    }
    for name, value in load_file(case.folder / "weights.safetensors").items():
        prefix = next((p for p in ours if name.startswith(p)), None)
        if prefix is not None and (queries or ("qllama" not in name and "query" not in name)):
            weights[ours[prefix] + name.removeprefix(prefix)] = value
    model: Any = load(write(tmp_path / "out", weights, About(cfg)), device="cpu")[1]
    close(model.visual_embeddings(pixels(case)), case.outputs[output])
