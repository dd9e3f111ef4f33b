"""Our models agree with stored outputs of the official ones, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from packed_cases import CASES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from internvl_jax.convert.case import FAMILY_INPUTS, CaseError
from internvl_jax.convert.verify import TOLERANCE, verify

PACKED = sorted(p.stem for p in CASES.glob("*.zip"))
SLOW = {"stage2_loss_2rank"}
# Kept in the reference folder only; the packed cases cover the same code.
ELSEWHERE = (
    "internvit_interp",
    "internvit_qknorm_qkvbias_heads",
    "internvl_c",
    "internvl_g",
    "stage2_loss",
    "stage2_retrieval_loss_2rank",
)
# Cases of the later models, likewise; their folders lie beside the others'.
FAMILY = (
    "hf_internvl_300mstyle_qwen2",
    "hf_internvl_6bstyle_llama",
    "official_300m_qwen2_psv2_interp",
    "official_6bvit_vicuna_psv1_layer-4",
)


def check(folder: Path) -> None:
    """Every stored output is computed, and none differs by more than the tolerance."""
    report = verify(folder)
    bare = (folder / "meta.json").is_file() and "case" not in json.loads(
        (folder / "config.json").read_text()
    )
    stored = sum(
        name not in FAMILY_INPUTS if bare else name.startswith("out/")
        for file in folder.glob("io*.safetensors")
        for name in safe_open(file, "np").keys()  # noqa: SIM118
    )
    assert len(report.compared) == stored > 0
    assert not report.left_out and not report.excused
    assert [c for c in report.compared if not c.passed] == []
    assert report.passed
    # A tolerance that everything passes by far: the paths really are the same.
    ordinary = [c.relative for c in report.compared if c.peak > 1e-6]
    assert max(ordinary) < TOLERANCE / 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PACKED]
)
def test_packed_case(name: str, stored: Callable[[str], Path]) -> None:
    check(stored(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_case_of_the_reference_folder(name: str, reference_root: Path) -> None:
    check(reference_root / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_case_of_the_family_folder(name: str, reference_root: Path) -> None:
    check(reference_root.parent / "family" / name)


def test_empty_tiles_may_stand_anywhere(stored: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stored("official_6bvit_llama_psv2_tiles"), tmp_path / "case")
    tensors = load_file(folder / "io.safetensors")
    assert tensors["image_flags"].ravel().tolist() == [1, 1, 1, 0]
    for name, tensor in tensors.items():
        if name.startswith(("vision_", "image_", "pixel_")):
            tensors[name] = tensor[[0, 3, 1, 2]]
    save_file(tensors, folder / "io.safetensors")
    check(folder)


def test_fractional_positions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"weights_from": "elsewhere"}')
    (tmp_path / "meta.json").write_text('{"kind": "hf_v2pe"}')
    with pytest.raises(CaseError, match="V2PE's fractional positions are not supported"):
        verify(tmp_path)


def test_all_kinds_of_cases_are_packed() -> None:
    assert {"hf_internvl_300mstyle_qwen3_interp", "official_6bvit_llama_psv2_tiles"} <= set(PACKED)
    assert {"internvit_base", "internvl_c_pytorch", "qllama_lm", "chat_features"} <= set(PACKED)
    assert {"stage2_loss_2rank", "stage2_retrieval_loss"} <= set(PACKED)
