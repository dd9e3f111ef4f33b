"""Programs with known costs, compiled for absent TPUs and read back."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_jax.plan.hlo import Module, parse
from internvl_jax.plan.roofline import Rates, Report, roofline
from internvl_jax.plan.trips import TripCountError
from tests.plan.programs import ATTENTION, PATCH, B, D, L

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler"),
]
RATES = Rates(flops=459e12, hbm=2765e9, ici=270e9)
MATMUL = 2 * B * D * D


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1"])
def dumps(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dumps")
    script = Path(__file__).with_name("programs.py")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, str(script), request.param, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def read(dumps: Path, name: str) -> Module:
    (path,) = (
        path
        for path in (dumps / name).glob("*after_optimizations.txt")
        if ".extracted." not in path.name  # what the SparseCores run, called from the main text
    )
    return parse(path.read_text())


def report(dumps: Path, name: str) -> Report:
    return roofline(read(dumps, name), RATES)


@pytest.mark.parametrize(
    ("name", "matmuls"),
    [
        ("matmul", 1),
        ("scan", L),
        ("map", L),
        ("nested", 3 * L),
        ("from_two", 7),
        ("branches", 3 * L),
        ("remat", 4 * L),  # forward, again, and two gradients
    ],
)
def test_matrix_flops_of_loops_are_exact(dumps, name, matmuls):
    assert report(dumps, name).flops == matmuls * MATMUL


def test_a_loop_bounded_by_data_has_no_count(dumps):
    with pytest.raises(TripCountError, match="depends on data"):
        report(dumps, "data_bound")


@pytest.mark.parametrize(("name", "products"), [("attention", 1), ("attention_grad", 3)])
def test_matrix_flops_of_attention_are_exact(dumps, name, products):
    a = ATTENTION
    flops = 2 * a["B"] * a["N"] * a["T"] * a["S"] * a["H"]
    assert report(dumps, name).flops == products * flops


def test_matrix_flops_of_patches_are_exact(dumps):
    p = PATCH
    patches = p["B"] * (p["size"] // p["patch"]) ** 2
    assert report(dumps, "patches").flops == 2 * patches * p["patch"] ** 2 * 3 * p["width"]


@pytest.mark.parametrize("name", ["matmul", "attention", "patches"])
def test_flops_equal_the_compilers_where_nothing_loops(dumps, name):
    found = report(dumps, name).flops
    compilers = json.loads((dumps / name / "cost.json").read_text())["flops"]
    # The compiler adds elementwise FLOPs and subtracts nothing.
    assert found <= compilers <= 1.03 * found


def test_bytes_are_those_of_the_arrays(dumps):
    assert report(dumps, "elementwise").bytes == 2 * 2 * 4096**2
    stack = 2 * L * D * D
    # The stack is read and written once, and a carry of one layer comes and goes. Whole stacks for
    # each layer would be 14 of them.
    assert 2 * stack <= report(dumps, "keep").bytes <= 4.1 * stack
    rows = 4 * 64 * 512
    assert 1.9 * rows <= report(dumps, "take").bytes <= 2.5 * rows


def test_sharded_layers_gather_weights_and_reduce_gradients(dumps):
    found = report(dumps, "fsdp")
    assert found.flops == pytest.approx(4 * L * MATMUL / 4, rel=1e-6)
    moved = {}
    for c in found.collectives:
        moved[c.kind] = moved.get(c.kind, 0) + c.bytes
    # Weights arrive once forwards and once backwards.
    assert moved["all-gather"] == pytest.approx(2 * L * D * D * 2, rel=0.01)
    # Gradients leave once, padded by the compiler to what its rings like.
    reduced = moved.get("reduce-scatter", 0) + moved.get("all-reduce", 0)
    assert L * D * D * 2 <= reduced <= 1.35 * L * D * D * 2


def test_collectives_in_a_loop_have_their_bytes_and_counts(dumps):
    found = {c.kind: c for c in report(dumps, "collectives").collectives}
    rows = 4 * B * D  # bytes of one shard, f32
    assert found["all-gather"].count == 5
    assert found["all-gather"].bytes == 5 * 4 * rows
    assert found["all-reduce"].bytes == 5 * 4 * rows
    assert found["all-reduce"].seconds == pytest.approx(2 * 5 * 4 * rows / RATES.ici)
    assert found["reduce-scatter"].bytes == pytest.approx(5 * 4 * rows, rel=0.15)  # padded
    assert found["collective-permute"].asynchronous
    assert found["collective-permute"].bytes >= 5 * rows
    (exchanged,) = report(dumps, "exchange").collectives
    assert (exchanged.kind, exchanged.count, exchanged.bytes) == ("all-to-all", 1, rows)


def test_what_is_listed_adds_up(dumps):
    found = report(dumps, "fsdp")
    lines = found.top(10_000)
    assert sum(line.seconds for line in lines) == pytest.approx(found.step_s)
    assert sum(found.by_kind.values()) == pytest.approx(found.step_s)
    assert lines == sorted(lines, key=lambda line: -line.seconds)
    assert any("programs.py" in line.code for line in lines)
