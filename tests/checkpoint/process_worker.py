"""One process of a tiny distributed run: python process_worker.py PORT COUNT INDEX WORKDIR MODE.

Not a test: started by test_processes.py. The mode ``preempt`` runs until a SIGTERM that the last
process sends itself, any other mode for two steps. Every process writes what it saw to
WORKDIR/<mode>-<index>.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.checkpoint import Checkpoints, Preemption


def connect(port: str, count: int, index: int) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            count,
            index,
            initialization_timeout=60,
            heartbeat_timeout_seconds=10,
            shutdown_timeout_seconds=30,
            cluster_detection_method="deactivate",
        )


def make(value: float, sharding: NamedSharding) -> jax.Array:
    x = np.arange(8 * 256, dtype=np.float32).reshape(8, 256) + value
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def main(port: str, count: int, index: int, workdir: pathlib.Path, mode: str) -> None:
    connect(port, count, index)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("x",), ()))
    state = {"split": make(0.25, split), "whole": make(0.5, everywhere)}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    update = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t), donate_argnums=0)
    start, meta = 0, None
    with Preemption() as preemption, Checkpoints(workdir) as checkpoints:
        if checkpoints.latest() is not None:
            state, meta, start = checkpoints.restore(abstract)
        for step in range(start + 1, 1000 if mode == "preempt" else start + 3):
            state = update(state)
            assert checkpoints.check_errors() == []
            if mode == "preempt":
                time.sleep(0.02)
                if step == 3 and index == count - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            if step % 2 == 0:
                checkpoints.save(step, state, {"step": step}, metrics={"loss": 1 / step})
            if preemption.requested(step):
                checkpoints.save(step, state, {"step": step})
                break
        seen = {"start": start, "meta": meta, "last": step, "committed": checkpoints.wait()}
    (workdir / f"{mode}-{index}.json").write_text(json.dumps(seen))
    if count > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]), sys.argv[5])
