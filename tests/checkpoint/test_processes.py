"""Two processes: one async checkpoint, SIGTERM heard at one step, resumed by another count."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from internvl_jax.checkpoint import read_tree

WORKER = pathlib.Path(__file__).with_name("process_worker.py")
ROOT = WORKER.parents[2]


def launch(count: int, workdir: pathlib.Path, mode: str) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    logs = [workdir / f"{mode}-{index}.log" for index in range(count)]
    running = []
    for index, log in enumerate(logs):
        command = [sys.executable, str(WORKER), port, str(count), str(index), str(workdir), mode]
        with log.open("w") as stream:
            running.append(
                subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * count, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((workdir / f"{mode}-{index}.json").read_text()) for index in range(count)]


def reference(steps: int) -> dict[str, np.ndarray]:
    start = np.arange(8 * 256, dtype=np.float32).reshape(8, 256)
    state = {"split": start + np.float32(0.25), "whole": start + np.float32(0.5)}
    for _ in range(steps):
        state = {k: x * np.float32(1.5) + np.float32(1) for k, x in state.items()}
    return state


def check(workdir: pathlib.Path, step: int) -> None:
    stored = read_tree(workdir, step)
    for name, value in reference(step).items():
        np.testing.assert_allclose(stored[name], value, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_stop_together_survive_damage_and_one_resumes(tmp_path):
    first = launch(2, tmp_path, "preempt")
    (last,) = {seen["last"] for seen in first}
    assert last < 999 and all(seen["committed"] == last for seen in first)
    check(tmp_path, last)

    # Only what process 1 wrote is damaged: both must go back to the same older step.
    state = tmp_path / "checkpoints" / str(last) / "state"
    for file in (state / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)
    second = launch(2, tmp_path, "again")
    assert {seen["start"] for seen in second} == {(last - 1) // 2 * 2}
    assert (tmp_path / "rejected" / f"{last}-0").is_dir()
    (newest,) = {seen["committed"] for seen in second}
    check(tmp_path, newest)

    (third,) = launch(1, tmp_path, "alone")
    assert third["start"] == newest and third["meta"] == {"step": newest}
    check(tmp_path, third["committed"])
