"""``python -m internvl_jax.plan --config=configs/stage1_contrastive.py:v5p_8x8x8``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internvl_jax.config import ConfigError, run


def _flags(flags: Any) -> None:
    flags.DEFINE_string("topology", "", "TPU slice, e.g. v5p:8x8x8; the config's by default.")
    flags.DEFINE_integer("slices", 1, "Slices of that shape.", lower_bound=1)
    flags.DEFINE_integer("phase", 0, "Which phase of the run.", lower_bound=0)
    flags.DEFINE_string("json", "", "File for every figure.")
    flags.DEFINE_string("dump", "", "Folder that keeps the scheduled program.")
    flags.DEFINE_string("chart", "", "Picture of memory and time by kind.")
    flags.DEFINE_string(
        "sweep",
        "",
        "'NAME=VALUE|VALUE; NAME=...': plan every combination, or 'internvit': the paper's "
        "architecture search.",
    )
    flags.DEFINE_integer("top", 0, "List so many of the costliest operations.")
    flags.DEFINE_bool("codegen", False, "Compile to machine code as well (minutes).")
    flags.DEFINE_bool("calibrate", False, "Measure the compiler's own estimate against ours.")


def _fill(config: Any) -> Any:
    from internvl_jax.train.experiment import completed

    return config if "rows" in config else completed(config)


def main(config: Any, flags: Any) -> int:
    """Plans a config, a sweep or a list of rows.

    Returns:
        0 where it fits (of a sweep, where anything does; of a list, where every row reaches its
        target), 1 where not.
    """
    from internvl_jax.plan import sweep
    from internvl_jax.plan.compile import PlanError, need_compiler
    from internvl_jax.plan.report import plan
    from internvl_jax.plan.show import chart, order, table, text
    from internvl_jax.train.experiment import resolve

    need_compiler()
    try:
        if "rows" in config:
            found, good = _rows([dict(row) for row in config.rows], flags.dump)
        else:
            topology = _topology(flags.topology or config.topology, flags.slices)
            if flags.calibrate:
                from internvl_jax.plan.calibrate import calibrate

                print(calibrate(topology))
                return 0
            if flags.phase >= max(len(config.phases), 1):
                raise ConfigError(
                    f"--phase={flags.phase}: this run has {len(config.phases)} phases."
                )
            if not flags.sweep:
                one = plan(
                    resolve(config),
                    topology,
                    phase=flags.phase,
                    dump=flags.dump or None,
                    codegen=flags.codegen,
                )
                print(text(one, top=flags.top))
                _write(flags.json, one.summary())
                if flags.chart:
                    chart([(topology.name, one)], flags.chart)
                return 0 if one.fits else 1
            if flags.sweep == "internvit":
                made = sweep.architecture_search(config, topology, flags.phase)
            else:
                made = sweep.sweep(config, topology, flags.sweep, flags.phase)
            found = sorted(_shown(made), key=lambda item: order(item[1]))
            good = not isinstance(found[0][1], Exception) and found[0][1].fits
    except PlanError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(found))
    _write(flags.json, {label: _summary(one) for label, one in found})
    drawn = [(label, one) for label, one in found if not isinstance(one, Exception)]
    if flags.chart and drawn:
        chart(drawn, flags.chart)
    return 0 if good else 1


def _topology(name: str, slices: int) -> Any:
    from internvl_jax.chips import Topology

    if not name:
        raise ConfigError("No topology: give --topology=v5p:8x8x8, or a config made for one.")
    try:
        return Topology.parse(name, slices)
    except ValueError as error:
        raise ConfigError(f"--topology: {error}") from error


def _shown(made: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """All of them, each told about as it comes."""
    from internvl_jax.plan.show import line

    found = []
    for label, one in made:
        found.append((label, one))
        print(f"{len(found)}: {label}: {line(one)}", file=sys.stderr, flush=True)
    return found


def _rows(rows: list[dict[str, Any]], dump: str) -> tuple[list[tuple[str, Any]], bool]:
    """A list of plans, and whether each fits and reaches its target."""
    from internvl_jax.plan.sweep import rows as plan_rows

    found = _shown(plan_rows(rows, dump))
    missed = [
        f"{label} (aim {row['target']:.2f})"
        for row, (label, one) in zip(rows, found, strict=True)
        if isinstance(one, Exception) or not one.fits or one.bound_a < row["target"]
    ]
    reached = f"{len(rows) - len(missed)} of {len(rows)} rows fit and reach their aim"
    print(f"{reached}; missed: {', '.join(missed)}." if missed else f"{reached}.")
    return found, not missed


def _summary(plan: Any) -> Any:
    return {"error": str(plan)} if isinstance(plan, Exception) else plan.summary()


def _write(path: str, value: Any) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, _flags, _fill)
