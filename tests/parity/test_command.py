"""The command: what it says, what it writes, and that it cannot be fooled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic_cases import config, tower

from internvl_jax.convert.__main__ import main
from internvl_jax.convert.verify import NOISE_FLOOR, TOLERANCE, compare


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A vision tower that agrees."""
    return tower(tmp_path / "case", config(vision_config__num_hidden_layers=2), seed=7)


def change(folder: Path, file: str, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = {n: x.copy() for n, x in load_file(folder / file).items()}
    edit(tensors)
    save_file(tensors, folder / file)


def test_agreement_is_reported(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(case), "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "hidden_states" in printed and "pooler_output" in printed and "passed: 2" in printed
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["left_out"] == []
    assert [t["name"] for t in report["tensors"]] == ["hidden_states", "pooler_output"]
    for tensor in report["tensors"]:
        assert 0 < tensor["max_abs_error"] < tensor["max_magnitude"] * TOLERANCE
        assert tensor["verdict"] == "ok"


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc2.weight", "encoder.layers.0.ls1"])
def test_a_corrupted_weight_fails(
    name: str, case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def corrupt(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[3] += 0.01

    change(case, "weights.safetensors", corrupt)
    assert main(["verify", str(case)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_corrupted_weight_of_a_stored_case_fails(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(stored("internvl_c_pytorch"), tmp_path / "case")

    def corrupt(tensors: dict[str, np.ndarray]) -> None:
        tensors["transformer.layers.1.self_attn.q_proj.weight"][5, 7] += 0.1

    change(folder, "weights.safetensors", corrupt)
    assert main(["verify", str(folder)]) == 1


def test_what_is_not_computed_fails(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(case, "io.safetensors", lambda t: t.update({"out/novelty": np.ones(3, np.float32)}))
    assert main(["verify", str(case)]) == 1
    assert "novelty: FAIL (not computed)" in capsys.readouterr().out


def test_a_stored_tensor_of_another_shape_fails(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        case, "io.safetensors", lambda t: t.update({"out/pooler_output": t["out/pooler_output"].T})
    )
    assert main(["verify", str(case)]) == 1
    assert "should be [45, 2]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("encoder.layers.1.ls2"), "lacks encoder.layers.1.ls2"),
        (lambda t: t.update(head=np.ones(2, np.float32)), "has the unknown head"),
        (
            lambda t: t.update({"encoder.layers.0.ls1": np.ones(44, np.float32)}),
            "misshapes encoder.layers.0.ls1 (is [44], should be [45])",
        ),
    ],
)
def test_weights_must_fit_exactly(
    edit: Callable[[dict[str, np.ndarray]], object],
    says: str,
    case: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(case, "weights.safetensors", edit)
    assert main(["verify", str(case)]) == 78
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_folders_that_are_none(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 78
    assert "nowhere is not a folder" in capsys.readouterr().err

    described = json.loads((case / "config.json").read_text())
    (case / "config.json").write_text(json.dumps({**described, "case": "riddle"}))
    assert main(["verify", str(case)]) == 78
    assert "unknown kind 'riddle'" in capsys.readouterr().err

    (case / "config.json").write_text("{")
    assert main(["verify", str(case)]) == 78
    assert "config.json" in capsys.readouterr().err

    (case / "config.json").unlink()
    assert main(["verify", str(case)]) == 78
    assert "lacks config.json" in capsys.readouterr().err


def test_a_bad_folder_does_not_hide_the_others(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "nowhere"), str(case)]) == 78
    said = capsys.readouterr()
    assert "passed: 2" in said.out and "nowhere" in said.err


def test_a_damaged_file_is_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (case / "weights.safetensors").read_bytes()
    (case / "weights.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["verify", str(case)]) == 78
    assert "weights.safetensors is not a readable safetensors file" in capsys.readouterr().err


def test_rules_of_comparison() -> None:
    reference = np.array([3.0, -200.0, 0.0], np.float32)
    assert compare("x", reference + 0.019, reference).passed
    assert not compare("x", reference + 0.021, reference).passed
    assert not compare("x", np.array([3.0, np.nan, 0.0]), reference).passed
    zero = np.zeros(3, np.float32)
    assert compare("x", zero + 5e-8, zero).passed and not compare("x", zero + 1e-6, zero).passed

    ids = np.array([1, 2, 3])
    assert compare("ids", ids, ids).passed and not compare("ids", np.array([1, 2, 4]), ids).passed

    cut = np.array([1.0, -np.inf], np.float32)
    assert compare("scores", cut, cut).passed
    assert not compare("scores", np.array([-np.inf, 1.0]), cut).passed
    assert not compare("scores", np.array([1.0, -50.0]), cut).passed

    noise = np.full(4, NOISE_FLOOR / 3, np.float32)
    name = "grad/clip_projector2.cross_attn.k_bias"
    assert compare(name, -noise, noise).passed
    assert not compare(name, noise * 100, noise).passed
    assert not compare("grad/clip_projector2.cross_attn.q_bias", -noise, noise).passed
