"""TPU slices as modifiers of an experiment: where its mesh, memory and compiler settings live.

A configuration lists the slices that it was planned for in a table of its own; an argument such as
``v5p_8x8x8`` or ``v5p_2x8x8x8`` (two slices) picks one. `python -m internvl_jax.plan` says what
each is good for. The cloud's accelerator names are not typed here: `internvl_jax.chips` derives
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def apply(config: ConfigDict, name: str, settings: Mapping[str, Any]) -> None:
    """Sets an experiment up for a slice.

    Args:
        config: the experiment.
        name: the slice, e.g. ``v5p_8x8x8``.
        settings: ``fsdp``, how many chips share the parameters, replicas take the rest; ``remat``
            as in `internvl_jax.nn.stack.parse_remat`; optionally ``tensor``, ``accumulate``,
            ``flags`` for the compiler, ``layout`` of the frozen parameters, and ``phases``, each
            one's ``remat`` where it is another.
    """
    config.topology = name.replace("_", ":")
    config.mesh = dict(replica=-1, fsdp=settings["fsdp"], tensor=settings.get("tensor", 1))
    config.stage.compute.remat = settings["remat"]
    config.train.accumulate = settings.get("accumulate", 1)
    config.train.frozen_layout = settings.get("layout", "default")
    config.train.compiler_options = dict(settings.get("flags", {}))
    if "phases" in settings:
        config.phases = tuple(
            {
                **phase,
                "stage": {**phase["stage"], **(dict(compute=dict(remat=remat)) if remat else {})},
            }
            for phase, remat in zip(config.phases, settings["phases"], strict=True)
        )
