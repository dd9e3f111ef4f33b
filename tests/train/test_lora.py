"""Runs that train adapters: they learn, what they stand on stays, a checkpoint holds little."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_jax import pretrained
from internvl_jax.checkpoint import CheckpointError, iter_leaves, read_tree
from internvl_jax.checkpoint.storage import find_step, load_meta
from internvl_jax.nn.lora import adapters
from internvl_jax.train import loop
from internvl_jax.train.experiment import InitConfig, SourceConfig
from internvl_jax.train.loop import train
from internvl_jax.tree import flatten

STEPS = 12


def run(experiment: Any, workdir: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        assert train(experiment, str(workdir)) == 0


def stored(workdir: Path) -> dict[str, np.ndarray]:
    return flatten(read_tree(workdir))


def losses(workdir: Path, group: str = "train") -> list[float]:
    read = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[f"{group}/loss"] for line in read if f"{group}/loss" in line]


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(tiny, runs) -> Path:
    """A dialogue model of two steps, all of it trained."""
    short = dict(train__steps=2, train__save_every=2, train__eval_every=2)
    run(tiny("stage3_finetune", "tiny", **short), runs / "base")
    return runs / "base"


@pytest.fixture(scope="module")
def experiment(tiny, base):
    """Adapters in the LLM, with dropout, on top of it; what was float32 rests in bfloat16."""
    return tiny(
        "stage3_finetune",
        "lora,tiny",
        train__steps=STEPS,
        train__save_every=4,
        train__frozen_dtype="bfloat16",
        train__eval_every=STEPS,
        optim__peak_lr=3e-2,
        init=dict(sources=(dict(path=str(base)),), new_ok=(r".*_lora/[ab]",)),
    )


@pytest.fixture(scope="module")
def tuned(experiment, runs) -> Path:
    run(experiment, runs / "tuned")
    return runs / "tuned"


def test_adapters_learn_and_the_base_stays(base, tuned):
    found, before = stored(tuned), stored(base)
    (first,), (last,) = losses(base, "validation"), losses(tuned, "validation")
    assert last < first - 0.08  # on the same held-out batch
    trained = {path.removeprefix("params/") for path in found if path.startswith("params/")}
    assert len(adapters(trained)) == 7  # q, k, v, out, gate, up, down of the stacked layers
    assert {path.split("/")[0] for path in trained} == {"llm", "projector"}
    assert all(found[f"params/{path}"].any() for path in trained)  # b was zero
    for path in (p for p in found if p.startswith("frozen/")):
        name = path.removeprefix("frozen/")
        value = before.get(f"params/{name}", before.get(f"frozen/{name}"))
        assert found[path].dtype == "bfloat16"
        np.testing.assert_array_equal(found[path], value.astype("bfloat16"), err_msg=path)
    moments = {path.split("/mu/")[1] for path in found if "/mu/" in path}
    assert moments == trained


def test_a_checkpoint_holds_what_was_trained(base, tuned):
    leaves = load_meta(find_step(tuned)).leaves
    places = {path: leaf.at for path, leaf in leaves.items() if leaf.at is not None}
    assert set(places) == {path for path in leaves if path.startswith("frozen/")}
    assert {place.step_dir for place in places.values()} == {str(base / "checkpoints" / "2")}
    frozen = sum(leaf.read().nbytes for leaf in iter_leaves(tuned) if leaf.path in places)
    trained = sum(leaf.read().nbytes for leaf in iter_leaves(tuned) if leaf.path not in places)
    on_disk = size(tuned / "checkpoints" / str(STEPS))
    assert trained < on_disk < trained + 0.5 * frozen  # a small model: names and tables count


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_bit_for_bit(experiment, tuned, runs, monkeypatch):
    real = loop.Run._log

    class Crash(Exception):
        pass

    def log(self, stage, metrics):
        real(self, stage, metrics)
        if self.step == 6:
            raise Crash

    monkeypatch.setattr(loop.Run, "_log", log)
    with pytest.raises(Crash), contextlib.redirect_stderr(io.StringIO()):
        train(experiment, str(runs / "broken"))
    monkeypatch.setattr(loop.Run, "_log", real)
    run(experiment, runs / "broken")
    assert losses(runs / "broken") == losses(tuned)
    expected = stored(tuned)
    found = stored(runs / "broken")
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    links = load_meta(find_step(runs / "broken")).leaves
    assert links == load_meta(find_step(tuned)).leaves


@pytest.mark.slow
def test_the_model_can_be_loaded_and_the_next_run_starts_from_it(
    base, tuned, experiment, runs, tmp_path
):
    _, model, _ = pretrained.load(str(tuned))
    found = stored(tuned)
    np.testing.assert_array_equal(model.vision.pos[...], found["frozen/vision/pos"])
    adapter = model.llm.periods.layers.first.mlp.down_lora
    path = "params/llm/periods/layers/first/mlp/down_lora/b"
    np.testing.assert_array_equal(adapter.b[...], found[path])
    # The next one links to the base, wherever the run between them goes.
    again = dataclasses.replace(
        experiment,
        init=InitConfig(sources=(SourceConfig(str(tuned)),)),
        train=dataclasses.replace(experiment.train, steps=1, save_every=1, eval_every=0),
    )
    run(again, runs / "next")
    places = {
        leaf.at.step_dir
        for leaf in load_meta(find_step(runs / "next")).leaves.values()
        if leaf.at is not None
    }
    assert places == {str(base / "checkpoints" / "2")}


def test_a_layout_of_the_compilers_choice_changes_nothing(experiment, tuned, base, runs):
    settings = dataclasses.replace(
        experiment.train, steps=2, save_every=2, eval_every=2, frozen_layout="auto"
    )
    optim = dataclasses.replace(experiment.optim, schedule="constant")
    experiment = dataclasses.replace(experiment, train=settings, optim=optim)
    run(experiment, runs / "auto")
    np.testing.assert_allclose(losses(runs / "auto"), losses(tuned)[:2], rtol=1e-5)
    assert losses(runs / "auto", "validation")
    found, before = stored(runs / "auto"), stored(tuned)
    for path in (p for p in found if p.startswith("frozen/")):
        np.testing.assert_array_equal(found[path], before[path], err_msg=path)


def test_a_base_that_is_gone_ends_the_run_with_a_sentence(base, tuned, experiment, tmp_path):
    shutil.copytree(tuned, tmp_path / "alone")  # links are spelled from the folder of runs
    with pytest.raises(CheckpointError, match=r"base/checkpoints/2, which is not there: move"):
        train(experiment, str(tmp_path / "alone"))


def test_the_rank_of_a_tower_is_a_flag():
    command = [sys.executable, "-m", "internvl_jax.train", "--print_config", "--workdir=none"]
    command += ["--config=configs/stage3_finetune.py:lora,tiny"]
    command += ["--config.stage.model.llm.lora.rank=8", "--config.stage.model.vision.lora.rank=4"]
    command += ["--config.stage.model.llm.lora.alpha=8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert {
        "stage.model.llm.lora.rank = 8",
        "stage.model.llm.lora.alpha = 8.0",
        "stage.model.vision.lora.rank = 4",
    } <= set(done.stdout.splitlines())
