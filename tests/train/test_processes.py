"""Runs in processes of their own: killed, asked to stop, two at once; none of it shows."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_jax.checkpoint import read_tree
from internvl_jax.train.loop import train
from internvl_jax.tree import flatten

ROOT = Path(__file__).parents[2]
STEPS = 40


def settings(steps: int = STEPS) -> dict[str, Any]:
    """What the runs of this file change in the tiny stage 0."""
    return dict(train__steps=steps, train__save_every=3, train__eval_every=0)


class Job:
    """One `python -m internvl_jax.train` of the tiny stage 0."""

    def __init__(
        self,
        data_dir: Path,
        workdir: Path,
        *arguments: str,
        devices: int = 8,
        steps: int = STEPS,
    ):
        tokenizer = data_dir / "shapes" / "1.0.0" / "tokenizer.model"
        changes = [f"--config.{k.replace('__', '.')}={v}" for k, v in settings(steps).items()]
        command = [
            *(sys.executable, "-m", "internvl_jax.train"),
            "--config=configs/stage0_language.py:tiny",
            *(*changes, f"--config.data.data_dir={data_dir}"),
            *(f"--config.data.tokenizer={tokenizer}", f"--workdir={workdir}", *arguments),
        ]
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        workdir.mkdir(exist_ok=True)
        self.workdir, self.log = workdir, (workdir / "said.txt").open("a+")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": " ".join(flags)},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def said(self) -> str:
        return (self.workdir / "said.txt").read_text()

    def reach(self, step: int) -> None:
        """Waits until metrics of a step are written."""
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            if self.process.poll() is not None:
                raise AssertionError(f"It ended before step {step}:\n{self.said()[-3000:]}")
            if step_of(self.workdir) >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"Step {step} was not reached:\n{self.said()[-3000:]}")

    def end(self, code: int, timeout: float = 120) -> None:
        """Waits for the end, which must have an exit code."""
        try:
            ended = self.process.wait(timeout)
        finally:
            self.process.kill()
            self.log.close()
        assert ended == code, self.said()[-3000:]


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl; the last may be cut off by a kill."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def step_of(workdir: Path) -> int:
    """The last step whose metrics are written."""
    written = lines(workdir)
    return written[-1]["step"] if written else 0


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """The work directory of the same run, never disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert train(tiny("stage0_language", **settings()), str(workdir)) == 0
    return workdir


def assert_equal(workdir: Path, undisturbed: Path) -> None:
    """The same losses and records of every step, none of them twice; the same parameters."""
    assert [x["step"] for x in lines(workdir)] == list(range(1, step_of(undisturbed) + 1))
    assert lines(workdir) == lines(undisturbed)
    expected = flatten(read_tree(undisturbed))
    found = flatten(read_tree(workdir))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_killed_twice_and_asked_to_stop_once(data_dir, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    moments = random.Random(0)
    for step in (4, 16):
        job = Job(data_dir, workdir)
        job.reach(step)
        time.sleep(moments.uniform(0, 0.1))
        job.process.kill()
        job.end(-signal.SIGKILL)
        assert step_of(workdir) < STEPS
    job = Job(data_dir, workdir)
    job.reach(28)
    job.process.terminate()
    job.end(75)
    stopped = step_of(workdir)
    assert f"Asked to stop: saved step {stopped}; start again to go on." in job.said()
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    job = Job(data_dir, workdir)
    job.end(0)
    assert_equal(workdir, undisturbed)


@pytest.mark.slow
def test_killed_at_a_dozen_random_moments(tiny, data_dir, tmp_path):
    """While it starts, compiles, trains or saves: wherever the moment falls."""
    steps, kills, reached = 150, 12, [0]
    moments = random.Random(int.from_bytes(os.urandom(4)))
    workdir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert train(tiny("stage0_language", **settings(steps)), str(undisturbed)) == 0
    for kill in range(kills):
        job = Job(data_dir, workdir, steps=steps)
        if kill % 2:  # amid the work: a few steps after it has begun again
            job.reach(reached[-1] + moments.randint(1, 9))
            time.sleep(moments.uniform(0, 0.05))
        else:  # anywhere, the first import included
            time.sleep(moments.uniform(0, 6))
        job.process.kill()
        job.end(-signal.SIGKILL)
        reached.append(step_of(workdir))
    print(f"killed after steps {reached[1:]}")
    job = Job(data_dir, workdir, steps=steps)
    job.end(0)
    assert_equal(workdir, undisturbed)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(data_dir: Path, workdir: Path) -> list[Job]:
    """Two processes of four devices each, one run."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        Job(data_dir, workdir, coordinator, "--process_count=2", f"--process_id={i}", devices=4)
        for i in range(2)
    ]


def close(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> None:
    """The same steps and record ids, losses to a millionth (sums in another order)."""
    assert [x["step"] for x in a] == [x["step"] for x in b]
    assert [x["train/records"] for x in a] == [x["train/records"] for x in b]
    losses = [[x["train/loss"] for x in run] for run in (a, b)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-6)


@pytest.mark.slow
def test_two_processes_equal_one_and_one_goes_on(data_dir, undisturbed, tmp_path):
    """SIGTERM to one of two stops both at one step; a single process takes over."""
    workdir = tmp_path / "run"
    jobs = pair(data_dir, workdir)
    jobs[0].reach(15)
    jobs[1].process.terminate()
    for job in jobs:
        job.end(75)
    stopped = step_of(workdir)
    assert 15 <= stopped < STEPS
    close(lines(workdir), lines(undisturbed)[:stopped])
    job = Job(data_dir, workdir)
    job.end(0)
    close(lines(workdir), lines(undisturbed))
