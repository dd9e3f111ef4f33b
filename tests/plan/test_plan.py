"""The verb: a tiny step compiled for an absent slice, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_jax.chips import CHIPS, Topology
from internvl_jax.config import ConfigError
from internvl_jax.plan import compile as compiling
from internvl_jax.plan.compile import read_memory
from internvl_jax.plan.sweep import internvit_variants, parse_sweep

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler"
)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "internvl_jax.plan", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator"),
    [
        ("v5p:8x8x8", 512, 128, "v5p-1024"),
        ("v5p:2x8x8x8", 1024, 256, "v5p-1024"),
        ("v4:8x8x16", 1024, 256, "v4-2048"),
        ("v5e:16x16", 256, 64, "v5litepod-256"),
        ("v6e:1x1", 1, 1, "v6e-1"),
    ],
)
def test_topologies_and_their_cloud_names(name, chips, hosts, accelerator):
    topology = Topology.parse(name)
    assert (topology.chips, topology.hosts, topology.accelerator) == (chips, hosts, accelerator)
    assert topology.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:8x8x8", "Unknown chip 'v5q'.*use v5p"),
        ("v5p-1024", "Unknown chip 'v5p-1024'"),
        ("v5p:16x16", "v5p slices have 3 sizes, as in v5p:8x8x8"),
        ("v5e:axb", "v5e slices have 2 sizes"),
        ("v5e", "v5e slices have 2 sizes"),
        ("v5e:0x4", "v5e slices have 2 sizes"),
    ],
)
def test_what_is_no_topology_is_said_in_a_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(name)


def test_every_tpu_has_the_rates_a_roofline_needs():
    for chip in CHIPS:
        if chip.dims:
            assert min(chip.flops, chip.hbm_bandwidth, chip.ici, chip.dcn, chip.host_link) > 1e9


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'internvl-jax\[tpu\]'"):
        compiling.need_compiler()


def test_memory_by_kind():
    assignment = """BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
allocation 1: size 1024, page 0, parameter 0, shape |f32[256]| at ShapeIndex {}:
allocation 2: size 512, page 0, parameter 1, shape |f32[128]| at ShapeIndex {}:
 value: <1 p @0> (size=512,offset=0): f32[128]
allocation 3: size 512, page 0, constant:
allocation 4: size 50000, page 0, preallocated-temp:
allocation 5: size 777, color 1, page 0, preallocated-temp:
allocation 6: size 4096, color 5, page 0, preallocated-temp:
"""
    report = """Memory Space: default (color=0)
Total bytes: 60000 (58.6KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   30.00KiB( 51%);   30.00KiB;            0;                2; bf16[96,160], f32[10]
   40.00KiB( 68%);   10.00KiB;        30720;                1; f32[2560]

Memory Space: vmem (color=1)
Total bytes: 777 (777B)
"""
    memory = read_memory(assignment, report)
    assert (memory.arguments, memory.temporaries, memory.host) == (1536, 50000, 4096)
    assert memory.peak == 51536
    assert [(b.size, b.shapes) for b in memory.largest] == [
        (30720, "bf16[96,160], f32[10]"),
        (10240, "f32[2560]"),
    ]


def test_sweeps_are_read():
    assert parse_sweep("mesh.fsdp=64|128; stage.compute.remat=full|fc1,gate") == [
        ("mesh.fsdp", [64, 128]),
        ("stage.compute.remat", ["full", "fc1,gate"]),
    ]
    with pytest.raises(ConfigError, match=r"'mesh\.fsdp' has no values"):
        parse_sweep("mesh.fsdp")


def test_the_architecture_search_has_the_papers_sixteen():
    found = internvit_variants()
    assert len(found) == 16
    assert dict(width=3200, depth=48, mlp_dim=12800, heads=25) in found
    assert dict(width=3200, depth=48, mlp_dim=12800, heads=50) in found
    for v in found:
        assert v["width"] % v["heads"] == 0
        matrices = v["depth"] * (4 * v["width"] ** 2 + 2 * v["width"] * v["mlp_dim"])
        assert 5.8e9 < matrices < 6.5e9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=configs/stage1_contrastive.py:tiny"], "No topology: give --topology"),
        (
            ["--config=configs/stage1_contrastive.py:tiny", "--topology=v5p:7"],
            "v5p slices have 3 sizes",
        ),
        (
            ["--config=configs/stage1_contrastive.py:tiny", "--topology=v5e:2x2", "--phase=5"],
            "this run has 2 phases",
        ),
    ],
)
@needs_compiler
def test_a_wrong_command_is_refused_in_a_sentence(arguments, sentence):
    done = plan(*arguments)
    assert done.returncode == 78, done.stderr
    assert sentence in done.stderr


@needs_compiler
def test_a_tiny_step_for_four_absent_chips(tmp_path):
    done = plan(
        "--config=configs/stage1_contrastive.py:tiny",
        "--topology=v5e:2x2",
        f"--json={tmp_path}/plan.json",
        f"--dump={tmp_path}/dump",
        f"--chart={tmp_path}/chart.png",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["fits"] and made["chips"] == 4
    assert 0 < made["hbm_peak_gib"] < made["hbm_capacity_gib"]
    # float32 parameters and batch: an FLOP ratio near one, padding aside.
    assert made["flops_ratio"] >= 1
    assert made["hlo_flops_per_chip"] == pytest.approx(
        made["flops_ratio"] * made["model_flops_per_chip"]
    )
    assert 0 < made["mfu_bound_b"] < made["mfu_bound_a"] < 1
    assert made["exposed_collectives_s"] <= sum(c["seconds"] for c in made["collectives"])
    assert {c["kind"] for c in made["collectives"]} >= {"all-gather"}
    assert {"jax", "libtpu"} <= made["versions"].keys()
    assert made["config"]["train"]["global_batch"] == 16
    assert (
        "HloModule jit_step"
        in next((tmp_path / "dump").glob("*jit_step*after_optimizations.txt")).read_text()
    )
    assert (tmp_path / "chart.png").stat().st_size > 5000
    assert "fits" in done.stdout and "bounds B .. A" in done.stdout


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_is_an_answer(tmp_path):
    done = plan(
        "--config=configs/stage1_contrastive.py",
        "--topology=v5e:2x2",
        "--config.train.global_batch=256",
        f"--json={tmp_path}/plan.json",
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT" in done.stdout and "GiB too much; largest" in done.stdout
    assert "try to" in done.stdout
    assert not json.loads((tmp_path / "plan.json").read_text())["fits"]
