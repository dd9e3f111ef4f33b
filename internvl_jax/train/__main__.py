"""``python -m internvl_jax.train --config=configs/stage0_language.py:tiny --workdir=runs/try``."""

from __future__ import annotations

import sys
from typing import Any

from internvl_jax.config import run


def _flags(flags: Any) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run, local or gs://.", required=True)
    flags.DEFINE_bool("distributed", False, "Join the other hosts of a pod (found by JAX itself).")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, where JAX cannot find it.")
    flags.DEFINE_integer("process_id", 0, "This process, with --coordinator.")
    flags.DEFINE_integer("process_count", 1, "Processes, with --coordinator.")
    flags.DEFINE_bool("print_config", False, "Print every resolved setting and stop.")


def _fill(config: Any) -> Any:
    from internvl_jax.train.experiment import completed

    return completed(config)


def main(config: Any, flags: Any) -> int:
    """Resolves the config, joins the pod, trains; returns the exit code."""
    from internvl_jax.config import resolved_text
    from internvl_jax.train.experiment import resolve

    experiment = resolve(config)
    if flags.print_config:
        print(resolved_text(experiment), end="")
        return 0

    import jax
    from absl import logging as absl_logging

    from internvl_jax.checkpoint import CheckpointError, CheckpointMismatch
    from internvl_jax.train.loop import train

    absl_logging.set_verbosity(absl_logging.WARNING)
    # A restart compiles nothing anew.
    jax.config.update("jax_compilation_cache_dir", f"{flags.workdir}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if flags.coordinator:
        jax.distributed.initialize(flags.coordinator, flags.process_count, flags.process_id)
    elif flags.distributed:
        jax.distributed.initialize()
    try:
        return train(experiment, flags.workdir)
    except (CheckpointMismatch, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 78


if __name__ == "__main__":
    run(main, _flags, _fill)
