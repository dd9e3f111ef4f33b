"""Our models agree with stored outputs of the official ones, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from packed_cases import CASES
from safetensors import safe_open

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


def check(folder: Path) -> None:
    """Every stored output is computed, and none differs by more than the tolerance."""
    report = verify(folder)
    stored = sum(
        name.startswith("out/")
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


def test_all_kinds_of_cases_are_packed() -> None:
    assert {"internvit_base", "internvl_c_pytorch", "qllama_lm", "chat_features"} <= set(PACKED)
    assert {"stage2_loss_2rank", "stage2_retrieval_loss"} <= set(PACKED)
