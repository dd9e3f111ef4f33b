"""InternVL-14B's tensors at true size, a twelfth of its layers: out, in, and the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.convert_full_size import run

LARGEST = 49_954 * 4096 * 2  # bytes of the embedding, in bfloat16


@pytest.mark.slow
def test_memory_stays_bounded_and_bits_the_same(tmp_path: Path) -> None:
    report = run(tmp_path / "run", 12)
    assert report["different"] == [] and report["leaves"] > 60
    assert report["parameters"] > 1.4e9
    peaks = {part["part"]: part["peak_gib"] * 2**30 for part in report["parts"]}
    assert max(peaks["export"], peaks["import"]) <= 2e9 + LARGEST
