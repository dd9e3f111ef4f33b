"""Trainers in processes of their own that work in turns, on the same cores and settings."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""The demo's, for all sides; glibc reads them when a process starts."""


class Spent(NamedTuple):
    """Wall and CPU seconds (of all threads)."""

    wall: float
    cpu: float


def same_conditions(module: str, threads: int) -> None:
    """Starts this program again with `MALLOC` set, on the first so many cores."""
    # XLA takes as many threads as there are cores to run on, PyTorch is told.
    settings = {**MALLOC, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    # A PyTorch thread that waits for another spins. Where anything else wants the core it then
    # spins away the other's time, and a step takes ten times as long.
    settings["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
    cores = sorted(os.sched_getaffinity(0))
    if settings.items() <= os.environ.items() and len(cores) <= threads:
        return
    os.sched_setaffinity(0, cores[:threads])
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **settings})


def clock() -> Spent:
    """Now."""
    return Spent(time.perf_counter(), time.process_time())


def since(start: Spent) -> Spent:
    """What passed."""
    now = clock()
    return Spent(now.wall - start.wall, now.cpu - start.cpu)


class Worker:
    """A side in its own process; between its turns it waits and takes no time."""

    def __init__(self, side: str, **settings: Any):
        context = multiprocessing.get_context("spawn")
        self.name = side
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, side, settings), daemon=True)
        self._process.start()
        there.close()
        self.version: str = self._receive()

    def __call__(self, what: str, *args: Any) -> Any:
        """Runs a function of `_Turns` there."""
        self._pipe.send((what, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"The process of {self.name!r} ended, see its message.") from None

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, side: str, settings: dict[str, Any]) -> None:
    turns = _Turns(side, **settings)
    pipe.send(turns.side.version)
    while True:
        what, args = pipe.recv()
        pipe.send(getattr(turns, what)(*args))


class _Turns:
    """What a worker can be asked for."""

    def __init__(self, side: str, *, batch: int, threads: int, steps: int = 10_000, seed: int = 0):
        from tests.benchmarks import sides

        self.side = sides.make(side, steps=steps, threads=threads, seed=seed)
        self.batch = sides.random_batch(sides.demo_stage(1.0), batch)
        self.seed, self.data = seed, None

    def prepare(self, keep: float, what: str) -> Spent:
        """Compiles and warms up."""
        start = clock()
        self.side.phase(keep)
        for _ in range(2):
            getattr(self.side, what)(self.batch)
            self.side.wait()
        return since(start)

    def measure(self, keep: float, what: str, count: int) -> Spent:
        """`count` calls of "step" or "forward", one after the other."""
        self.side.phase(keep)
        start = clock()
        for _ in range(count):
            getattr(self.side, what)(self.batch)
        self.side.wait()
        return since(start)

    def train(
        self, data: dict[str, Any], first: int, count: int, keep: float
    ) -> tuple[Spent, float]:
        """Steps first, first + 1, ... on the demo's data: what they took, and the last loss.

        Making the batches is the same for all sides and does not count; compiling does not either.
        """
        from data_pipelines.pipeline import make_pipeline

        if self.data is None:
            rows = len(self.batch["text"])
            self.data = make_pipeline(data, "contrastive", global_batch=rows, seed=self.seed)
        self.side.phase(keep)
        wall = cpu = 0.0
        for step in range(first, first + count):
            batch = self.data.batch(step).arrays
            start = clock()
            self.side.step(batch)
            loss = self.side.wait()
            spent = since(start)
            wall, cpu = wall + spent.wall, cpu + spent.cpu
        return Spent(wall, cpu), loss

    def compile(self, keep: float) -> Spent:
        """What the first call in a phase takes, without touching the parameters."""
        start = clock()
        self.side.phase(keep)
        self.side.compile(self.batch)
        return since(start)

    def judge(self, data: dict[str, Any]) -> dict[str, float]:
        """Name retrieval on the vendor that was never trained on, by the project's evaluator."""
        from data_pipelines.evaluation import gallery
        from data_pipelines.text import Tokenizer
        from internvl_jax.batch import SUMMARIZE
        from internvl_jax.evaluate.evaluators.name_retrieval import Embeddings, NameRetrieval

        pictures = gallery(data, split="held_out", which="all")
        evaluator = NameRetrieval(
            gallery=pictures,
            tokenizer=Tokenizer(data["tokenizer"]),
            mode="C",
            text_length=data["text_length"],
            lists=("judged",),
        )
        names = {}
        for language, texts in pictures.names.items():
            rows = evaluator.tokenizer.encode_batch(
                [SUMMARIZE + text for text in texts], evaluator.text_length
            )
            names[language] = _unit(self.side.embed_texts(*rows))
        return evaluator.score(Embeddings(_unit(self.side.embed_images(pictures.images)), names))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
