"""Metric writers: resumed series without repeated points, and runs that outlive their disk."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from internvl_jax.observe import writer as module
from internvl_jax.observe.writer import JsonlWriter, Writers, open_writers, read_jsonl


def steps(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_json_and_come_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    out = JsonlWriter(path)
    out.write(1, {"loss": np.float32(0.5), "bad": math.nan, "worse": -math.inf})
    out.text(2, "caption", "猫")
    out.images(2, "grid", np.zeros((1, 2, 2, 3), np.uint8))
    out.close()
    assert path.read_text().splitlines() == [
        '{"step": 1, "loss": 0.5, "bad": "nan", "worse": "-inf"}',
        '{"step": 2, "caption": "猫"}',
    ]
    first, second = read_jsonl(path)
    assert first["loss"] == 0.5 and math.isnan(first["bad"]) and first["worse"] == -math.inf
    assert second["caption"] == "猫"


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "m.jsonl"
    out = JsonlWriter(path)
    out.write(1, {"loss": 1.0})
    assert steps(path) == [1]  # a SIGKILL now would lose nothing
    out.close()


@pytest.mark.parametrize("resume, kept", [(4, [2, 4]), (5, [2, 4]), (100, [2, 4, 6, 8]), (0, [])])
def test_a_resumed_series_has_no_point_twice(tmp_path, resume, kept):
    path = tmp_path / "m.jsonl"
    out = JsonlWriter(path)
    for step in (2, 4, 6, 8):
        out.write(step, {"loss": step})
    out.close()
    with path.open("ab") as file:
        file.write(b'{"step": 10, "lo')  # killed while writing
    out = JsonlWriter(path, resume_step=resume)
    out.write(resume + 1, {"loss": 0})
    out.close()
    assert steps(path) == [*kept, resume + 1]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_an_intact_file_is_not_rewritten(tmp_path):
    path = tmp_path / "m.jsonl"
    out = JsonlWriter(path)
    out.write(1, {"loss": 1})
    out.close()
    inode = path.stat().st_ino
    out = JsonlWriter(path, resume_step=1)
    out.write(2, {"loss": 1})
    out.close()
    assert path.stat().st_ino == inode and steps(path) == [1, 2]


def test_a_full_disk_costs_nothing_but_time(tmp_path, monkeypatch, caplog):
    path = tmp_path / "m.jsonl"
    out = JsonlWriter(path)
    writers = Writers([out])
    writers.write(1, {"loss": 1})
    real = os.write

    def half(file, data):
        return real(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    writers.write(2, {"loss": 2})
    writers.write(3, {"loss": 3})
    assert steps(path) == [1]  # no half line is left
    assert writers.failures == {"JsonlWriter": 2}
    assert [m for m in caplog.messages if "JsonlWriter cannot write (the disk is full)" in m] == (
        caplog.messages
    )
    monkeypatch.setattr(os, "write", real)
    writers.write(4, {"loss": 4})
    writers.close()
    assert steps(path) == [1, 2, 3, 4] and len(caplog.messages) == 1


def test_a_folder_that_can_not_be_made_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    writers = open_writers(str(tmp_path / "file"))
    for step in range(3):
        writers.write(step, {"loss": 1})
    writers.close()
    assert writers.failures["JsonlWriter"] == 4 and len(caplog.messages) == 1


def test_one_failing_writer_does_not_silence_the_others(tmp_path):
    class Broken:
        def write(self, step, values):
            raise ConnectionError("gone")

        text = images = flush = close = write

    path = tmp_path / "m.jsonl"
    writers = Writers([Broken(), JsonlWriter(path)])
    writers.write(1, {"loss": 1})
    assert steps(path) == [1] and writers.failures == {"Broken": 1}
    writers._writers[1].close()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writers = open_writers(str(tmp_path), tensorboard=True)
    writers.write(1, {"loss": 1})
    writers.close()
    assert list(tmp_path.iterdir()) == []


def test_an_address_gets_copies_of_the_whole_file(tmp_path, monkeypatch):
    path = f"file://{tmp_path}/m.jsonl"
    stored = tmp_path / "m.jsonl"
    monkeypatch.setattr(
        module.epath, "Path", lambda p: pathlib.Path(str(p).removeprefix("file://"))
    )
    out = JsonlWriter(path)
    out.write(1, {"loss": 1})  # the first line goes at once
    assert steps(stored) == [1]
    out.write(2, {"loss": 1})
    assert steps(stored) == [1]  # later ones now and then
    out.flush()
    assert steps(stored) == [1, 2]
    out.write(3, {"loss": 1})
    out.close()
    assert steps(stored) == [1, 2, 3]
    out = JsonlWriter(path, resume_step=2)
    out.write(3, {"loss": 5})
    out.close()
    assert [r["loss"] for r in read_jsonl(stored)] == [1, 1, 5]


def events(folder: pathlib.Path) -> list:
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            event = event_pb2.Event()
            event.ParseFromString(raw[12 : 12 + size])
            found.append(event)
            raw = raw[12 + size + 4 :]
    return found


def test_tensorboard_hides_what_came_after_the_restored_step(tmp_path):
    pytest.importorskip("tensorboardX")
    writers = open_writers(str(tmp_path), tensorboard=True)
    writers.write(3, {"train/loss": 0.5})
    writers.text(3, "note", "hello")
    writers.images(3, "grid", np.zeros((2, 4, 4, 3), np.uint8))
    writers.flush()
    writers.close()
    assert not writers.failures
    found = events(tmp_path / "tensorboard")
    values = [v for event in found for v in event.summary.value]
    assert {v.tag.split("/text")[0] for v in values} >= {"train/loss", "note", "grid"}
    (loss,) = [v.simple_value for v in values if v.tag == "train/loss"]
    assert loss == 0.5

    folder = tmp_path / "resumed"
    module.TensorBoardWriter(str(folder), resume_step=7).close()
    starts = [e.step for e in events(folder) if e.session_log.status == 1]
    assert starts == [8]  # TensorBoard's rule: earlier events from this step on are void


class FakeRun:
    def __init__(self, step: int):
        self.step, self.logged, self.finished = step, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the service: remembers how runs were started."""
    fake = types.ModuleType("wandb")
    fake.started, fake.can_rewind = [], True
    fake.util = types.SimpleNamespace(generate_id=lambda: "abc")
    fake.Image = fake.Table = lambda *a, **k: ("shown", a, k)

    def init(**settings):
        if "resume_from" in settings and not fake.can_rewind:
            raise RuntimeError("rewinding is not available")
        fake.started.append((settings, FakeRun(9 if settings.get("resume") else 0)))
        return fake.started[-1][1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_continues_the_same_run(tmp_path, wandb, caplog):
    writers = open_writers(str(tmp_path), wandb="project", config={"lr": 1})
    writers.write(1, {"loss": np.float32(2)})
    writers.text(1, "caption", "<b>")
    writers.images(1, "grid", np.zeros((2, 4, 4, 3), np.uint8))
    writers.close()
    settings, run = wandb.started[0]
    assert (settings["id"], settings["project"], settings["config"]) == (
        "abc",
        "project",
        {"lr": 1},
    )
    assert run.logged[0] == (1, {"loss": 2.0}) and run.finished and not writers.failures

    open_writers(str(tmp_path), wandb="project", resume_step=7).close()
    assert wandb.started[1][0]["resume_from"] == "abc?_step=7"

    wandb.can_rewind = False
    writers = open_writers(str(tmp_path), wandb="project", resume_step=7)
    settings, run = wandb.started[2]
    assert (settings["id"], settings["resume"]) == ("abc", "allow")
    assert "could not be rewound" in caplog.text
    for step in (8, 9, 10):
        writers.write(step, {"loss": 1})
    writers.close()
    assert [step for step, _ in run.logged] == [9, 10]  # it has seen the steps before


def test_wandb_out_of_reach_is_left_out(tmp_path, wandb, caplog):
    wandb.init = lambda **settings: (_ for _ in ()).throw(ConnectionError("no network"))
    writers = open_writers(str(tmp_path), wandb="project")
    writers.write(1, {"loss": 1})
    writers.close()
    assert "no network" in caplog.text and steps(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.parametrize(
    "extra, module_name", [("wandb", "wandb"), ("tensorboard", "tensorboardX")]
)
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, extra, module_name):
    monkeypatch.setitem(sys.modules, module_name, None)
    wanted = {"wandb": "project"} if extra == "wandb" else {"tensorboard": True}
    with pytest.raises(ValueError, match=rf"pip install 'internvl-jax\[{extra}\]'"):
        open_writers(str(tmp_path), **wanted)
