"""Whole runs of the tiny configs: to the end, over phases, through hand-overs and bad data."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.tiny import VOCAB
from data_pipelines.sets import concepts as data
from internvl_jax import pretrained
from internvl_jax.checkpoint import CheckpointMismatch, read_tree
from internvl_jax.config import ConfigError
from internvl_jax.stages.generative import TRAIN_QUERIES
from internvl_jax.train import loop
from internvl_jax.train.loop import train
from internvl_jax.tree import flatten

STAGES = ("language", "contrastive", "generative", "finetune")


def lines(workdir: Path, group: str = "train") -> list[dict[str, Any]]:
    """What metrics.jsonl holds of one group, in order."""
    read = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [x for x in read if any(k.startswith(f"{group}/") for k in x)]


def stored(workdir: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint, by path."""
    return flatten(read_tree(workdir))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_to_its_end(chain, stage):
    run = chain[stage]
    assert run.code == 0
    trained, validated = lines(run.workdir), lines(run.workdir, "validation")
    assert [x["step"] for x in trained] == list(range(1, 9))
    assert [x["step"] for x in validated] == [4, 8]
    assert all(math.isfinite(x["train/loss"]) for x in trained)
    assert all(math.isfinite(x["validation/loss"]) for x in validated)
    assert trained[-1]["train/skipped"] == 0
    assert len({x["train/records"] for x in trained}) == 8
    saved = {int(p.name) for p in (run.workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert saved == set(range(2, 9, 2) if stage == "contrastive" else (4, 8))
    assert "100 %" in run.said


def test_losses_fall(chain):
    """Eight steps are few, but stage 0 starts from a uniform guess."""
    trained = lines(chain["language"].workdir)
    assert trained[0]["train/loss"] == pytest.approx(math.log(VOCAB), rel=0.1)
    assert trained[-1]["train/loss"] < trained[0]["train/loss"] - 0.2


def test_parameters_are_listed(chain):
    listed = (chain["generative"].workdir / "parameters.txt").read_text()
    trained, frozen = listed.split("frozen")
    assert "query_tokens" in trained and "vision/pos" not in trained
    assert "vision/pos" in frozen


def test_hand_over_says_what_came_from_where(chain):
    assert "loaded" not in chain["language"].said
    said = chain["contrastive"].said
    assert "qllama/" in said and "new     vision/pos" in said
    assert "resized 0" in said and "dropped 0" in said
    assert "new     query_tokens" in chain["generative"].said
    said = chain["finetune"].said
    assert "dropped text_projection" in said and "new     projector/fc1" in said


def test_hand_over_carries_the_values(chain):
    """What a stage froze is what the stage before ended with; what it trained has moved."""
    one, two, three = (stored(chain[s].workdir) for s in ("contrastive", "generative", "finetune"))
    for path, value in two.items():
        if path.startswith("frozen/"):
            name = path.removeprefix("frozen/")
            source = one.get(f"params/{name}", one.get(f"frozen/{name}"))
            np.testing.assert_array_equal(value, source, err_msg=path)
    assert not np.array_equal(two["params/logit_scale"], one["params/logit_scale"])
    cross = "qllama/periods/layers/first/cross/q"
    np.testing.assert_array_equal(three[f"frozen/{cross}"], two[f"params/{cross}"])
    np.testing.assert_array_equal(three["frozen/vision/pos"], one["params/vision/pos"])


def test_only_what_is_trained_has_moments(chain):
    kept = stored(chain["generative"].workdir)
    moments = {p.split("/mu/")[1] for p in kept if "/mu/" in p}
    assert moments == {p.split("/nu/")[1] for p in kept if "/nu/" in p}
    assert moments == {p.removeprefix("params/") for p in kept if p.startswith("params/")}
    stage = chain["generative"].experiment.stage
    assert stage.trainable_paths == TRAIN_QUERIES
    assert all(stage.trainable(p) for p in moments)
    assert not any(p.startswith(("vision/", "opt/vision")) for p in moments)


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_trained_can_be_loaded(chain, stage):
    loaded, model, meta = pretrained.load(str(chain[stage].workdir))
    assert meta["step"] == 8
    assert type(loaded) is type(chain[stage].experiment.stage)
    assert loaded.model == chain[stage].experiment.stage.model
    kept = stored(chain[stage].workdir)
    tower = "llm" if stage == "language" else "vision"
    path = "llm/embedding" if tower == "llm" else "vision/pos"
    expected = kept.get(f"params/{path}", kept.get(f"frozen/{path}"))
    value = model.llm.embedding[...] if tower == "llm" else model.vision.pos[...]
    np.testing.assert_array_equal(value, expected)


def test_a_surprise_at_hand_over_is_refused(chain, tmp_path):
    """A leaf that is new although nobody said so, and one left behind."""
    experiment = chain["generative"].experiment
    init = dataclasses.replace(experiment.init, new_ok=(r".*/cross/.*", r"query_tokens", r"itm_.*"))
    with pytest.raises(CheckpointMismatch, match="clip_projector2"):
        train(dataclasses.replace(experiment, init=init), str(tmp_path / "a"))
    experiment = chain["finetune"].experiment
    init = dataclasses.replace(experiment.init, dropped_ok=(r"clip_projector2?/.*",))
    with pytest.raises(CheckpointMismatch, match=r"itm_|text_projection|logit_scale"):
        train(dataclasses.replace(experiment, init=init), str(tmp_path / "b"))


class Crash(Exception):
    """Something that nothing foresees."""


def interrupted(monkeypatch, experiment, workdir: Path, steps: tuple[int, ...]) -> None:
    """Runs an experiment, breaking off right after each of the steps, until it is done."""
    real = loop.Run._log

    for step in steps:

        def log(self, stage, metrics, step=step):
            real(self, stage, metrics)
            if self.step == step:
                raise Crash

        monkeypatch.setattr(loop.Run, "_log", log)
        with pytest.raises(Crash):
            train(experiment, str(workdir))
    monkeypatch.setattr(loop.Run, "_log", real)
    assert train(experiment, str(workdir)) == 0


def test_a_run_that_broke_off_goes_on_bit_for_bit(chain, tmp_path, monkeypatch):
    """Once before the second phase begins, once within it."""
    seen = []
    real = loop.make_pipeline

    def spy(config, *args, split, **options):
        made = real(config, *args, split=split, **options)
        if split == "train":
            iterate = made.iterate

            def counted(step):
                seen.append((config["image_size"], step))
                return iterate(step)

            made.iterate = counted
        return made

    monkeypatch.setattr(loop, "make_pipeline", spy)
    run = chain["contrastive"]
    interrupted(monkeypatch, run.experiment, tmp_path, (3, 7))
    # Phase 1 from the start; both phases from the save at step 2; phase 2 from that at step 6.
    assert seen == [(24, 0), (24, 2), (32, 4), (32, 6)]
    assert lines(tmp_path) == lines(run.workdir)
    assert lines(tmp_path, "validation") == lines(run.workdir, "validation")
    expected = stored(run.workdir)
    for path, value in stored(tmp_path).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_finished_run_does_nothing_more(chain):
    run = chain["language"]
    before = (run.workdir / "metrics.jsonl").read_bytes()
    assert train(run.experiment, str(run.workdir)) == 0
    assert (run.workdir / "metrics.jsonl").read_bytes() == before


def test_non_finite_too_often_stops_with_70(tiny, tmp_path, caplog):
    experiment = tiny(
        "stage0_language",
        train__steps=20,
        train__global_batch=8,
        optim__peak_lr=1e30,
        optim__max_bad_steps=3,
    )
    with caplog.at_level(logging.ERROR):
        assert train(experiment, str(tmp_path)) == 70
    (sentence,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert sentence.startswith("3 updates in a row were skipped because loss or gradients")
    assert "lower optim.peak_lr" in sentence
    trained = lines(tmp_path)
    assert trained[-1]["train/bad_streak"] == 3 and trained[-1]["step"] < 10
    assert math.isfinite(trained[0]["train/loss"])


@pytest.fixture
def broken_pictures(monkeypatch):
    """Every eighth picture is cut off in the middle of its file."""
    real = data.decode

    def decode(encoded, *rest):
        broken = sum(encoded[-64:]) % 8 == 0
        return real(encoded[: len(encoded) // 2] if broken else encoded, *rest)

    monkeypatch.setattr(data, "decode", decode)
    data._shared.cache_clear()
    yield
    data._shared.cache_clear()


@pytest.mark.parametrize(("limit", "code"), [(0.01, 65), (0.9, 0)])
def test_broken_pictures_are_replaced_and_counted(
    chain, tmp_path, caplog, broken_pictures, limit, code
):
    experiment = chain["contrastive"].experiment
    settings = dataclasses.replace(experiment.train, max_bad_records=limit, eval_every=0)
    experiment = dataclasses.replace(experiment, train=settings, phases=())
    with caplog.at_level(logging.ERROR):
        assert train(experiment, str(tmp_path)) == code
    counts = [x["train/bad_records"] for x in lines(tmp_path)]
    assert counts == sorted(counts) and counts[-1] > 1
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    if code:
        assert len(counts) < 8
        assert f"records could not be used, more than train.max_bad_records={limit}" in said[-1]
    else:
        assert len(counts) == 8 and not said


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(mesh__replica=3), "config.mesh: .*8 devices do not divide by 3"),
        (dict(train__global_batch=12), "global_batch=12 does not split over 8 devices"),
        (dict(stage__trainable_paths=("nothing",)), "match no parameter: nothing would be trained"),
        (dict(mesh=dict(replica=1, fsdp=1, tensor=8)), "config.mesh: llm/.* does not divide"),
        (dict(data__tokenizer="/nowhere.model"), "config.data: .*/nowhere.model"),
        (dict(data__splitt="x"), "config.data: .*splitt"),
        (dict(data__dataset="abfs://no/package"), "config.data: abfs:// needs a package: pip inst"),
    ],
)
def test_settings_that_cannot_be_right(tiny, tmp_path, settings, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        train(tiny("stage0_language", **settings), str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_validation_split_is_said_before_the_first_step(tiny, tmp_path, monkeypatch):
    opened = loop.make_pipeline

    def no_validation(*args, split, **options):
        if split == "validation":
            raise FileNotFoundError("mine/validation has no manifest.json; index it.")
        return opened(*args, split=split, **options)

    monkeypatch.setattr(loop, "make_pipeline", no_validation)
    with pytest.raises(ConfigError, match=r"config\.data: mine/validation has no manifest"):
        train(tiny("stage0_language", train__eval_every=4), str(tmp_path / "first"))
    assert not lines(tmp_path / "first")
    never = tiny("stage0_language", train__eval_every=99, train__steps=2)
    assert train(never, str(tmp_path / "never")) == 0


def test_records_are_counted_beyond_2_31():
    run = loop.Run.__new__(loop.Run)
    run.bad, run.seen = collections.Counter(broken=3), 5 * 2**32 + 7
    run.records = np.arange(4, dtype=np.int64)
    assert run._records()[1:] == (3, 5 * 2**32 + 7)


def test_a_disk_that_takes_no_checkpoint_is_said(chain, tmp_path, caplog, monkeypatch):
    """The run goes on as long as it can, and does not pretend to have been saved."""
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *args: None)
    with caplog.at_level(logging.ERROR):
        assert train(chain["language"].experiment, str(tmp_path)) == 1
    assert "Step 8 could not be saved" in caplog.text


def test_paths_of_a_checkpoint(chain):
    paths = set(stored(chain["contrastive"].workdir))
    assert {p.split("/")[0] for p in paths} == {
        "params",
        "frozen",
        "opt",
        "step",
        "norm_mean",
        "skipped",
        "bad_streak",
    }
    assert "params/vision/blocks/layers/attn/qkv" in paths
