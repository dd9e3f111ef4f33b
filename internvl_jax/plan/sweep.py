"""Many plans: settings against each other, and a list of rows."""

from __future__ import annotations

import ast
import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl_jax.chips import Topology
from internvl_jax.config import ConfigError, load
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.plan.compile import PlanError
from internvl_jax.plan.report import Plan, plan
from internvl_jax.train.experiment import completed, resolve

Planned = tuple[str, Plan | Exception]


def parse_sweep(spec: str) -> list[tuple[str, list[Any]]]:
    """``mesh.fsdp=64|128; stage.compute.remat=full|fc1,gate`` -> names and their values.

    Raises:
        ConfigError: it is not of this form.
    """
    axes = []
    for part in filter(None, (p.strip() for p in spec.split(";"))):
        name, equals, values = part.partition("=")
        if not equals:
            raise ConfigError(f"--sweep: {part!r} has no values: write NAME=VALUE|VALUE; NAME=...")
        axes.append((name.strip(), [_value(v.strip()) for v in values.split("|")]))
    return axes


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def changed(config: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """A copy of a ConfigDict with some settings replaced. Raises ConfigError for unknown ones."""
    config = copy.deepcopy(config)
    for name, value in changes:
        *path, last = name.split(".")
        node = config
        for part in path:
            if part not in node:
                raise ConfigError(f"config has no setting {name!r} to sweep.")
            node = node[part]
        if last not in node:
            raise ConfigError(f"config has no setting {name!r} to sweep.")
        with node.unlocked(), node.ignore_type():
            node[last] = value
    return config


def sweep(config: Any, topology: Topology, spec: str, phase: int) -> Iterator[Planned]:
    """Plans every combination of settings."""
    axes = parse_sweep(spec)
    names = [name for name, _ in axes]
    jobs = []
    for values in itertools.product(*(values for _, values in axes)):
        changes = list(zip(names, values, strict=True))
        label = " ".join(f"{name.rsplit('.', 1)[-1]}={value}" for name, value in changes)
        jobs.append((label, _job(changed(config, changes), topology, phase)))
    return run(jobs)


def rows(listed: Iterable[Mapping[str, Any]], dump: str) -> Iterator[Planned]:
    """Plans the rows of a list such as ``configs/plan.py``.

    Args:
        listed: rows with a name, a config, settings, a phase and perhaps a topology.
        dump: folder that keeps the scheduled programs; empty to keep none.
    """

    def job(row: Mapping[str, Any]) -> Callable[[], Plan]:
        def make() -> Plan:
            config = changed(completed(load(row["config"])), row["settings"].items())
            topology = Topology.parse(row.get("topology") or config.topology)
            folder = Path(dump, re.sub(r"\W+", "_", row["name"])) if dump else None
            return plan(resolve(config), topology, phase=row["phase"], dump=folder and str(folder))

        return make

    return run((row["name"], job(row)) for row in listed)


def _job(config: Any, topology: Topology, phase: int) -> Callable[[], Plan]:
    return lambda: plan(resolve(config), topology, phase=phase)


def run(jobs: Iterable[tuple[str, Callable[[], Plan]]], workers: int = 2) -> Iterator[Planned]:
    """Runs plans side by side, in order; one that cannot be is its own result."""

    def attempt(job: Callable[[], Plan]) -> Plan | Exception:
        try:
            return job()
        except (PlanError, ValueError) as error:  # a ConfigError is a ValueError
            return error

    jobs = list(jobs)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(attempt, [job for _, job in jobs])
        yield from zip((label for label, _ in jobs), results, strict=True)


def internvit_variants() -> list[dict[str, Any]]:
    """The paper's architecture search (section 3.2): 16 towers of about six billion parameters.

    Depth 32, 48, 64 or 80, heads of 64 or 128 channels, MLP ratio 4 or 8; the width follows from
    the parameters, rounded up to whole heads.
    """
    found = []
    for depth, head, ratio in itertools.product((32, 48, 64, 80), (64, 128), (4, 8)):
        width = math.ceil((5.898e9 / (depth * (4 + 2 * ratio))) ** 0.5 / head) * head
        found.append(dict(width=width, depth=depth, mlp_dim=ratio * width, heads=width // head))
    return found


def architecture_search(config: Any, topology: Topology, phase: int) -> Iterator[Planned]:
    """Plans the stage with every one of `internvit_variants` as its vision tower.

    Their parameters and their FLOPs of one picture of 224 px are part of the names.
    """
    jobs = []
    for sizes in internvit_variants():
        changes = [(f"stage.model.vision.{name}", value) for name, value in sizes.items()]
        tower = VitConfig(**sizes)
        label = (
            f"{tower.width} wide, {tower.depth} deep, MLP {tower.mlp_dim}, {tower.heads} heads, "
            f"{tower.param_count() / 1e6:.0f} M, {tower.flops() / 1e9:.0f} GFLOP"
        )
        # A pooling head of 16 does not divide every width; the tower's own number does.
        changes.append(("stage.model.pool_heads", sizes["heads"]))
        jobs.append((label, _job(changed(config, changes), topology, phase)))
    return run(jobs)
