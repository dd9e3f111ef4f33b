"""``python -m internvl_jax.plan --config=configs/stage1_contrastive.py:v5p_8x8x8``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from internvl_jax.config import ConfigError, load, run


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
    """Plans a config, a sweep or a list of rows; returns 0 where everything fits, else 1."""
    from internvl_jax.chips import Topology
    from internvl_jax.plan.compile import PlanError, need_compiler
    from internvl_jax.plan.report import plan
    from internvl_jax.plan.show import chart, order, table, text
    from internvl_jax.plan.sweep import architecture_search, sweep
    from internvl_jax.train.experiment import resolve

    need_compiler()
    try:
        if "rows" in config:
            return _rows(config, flags)
        name = flags.topology or config.topology
        if not name:
            raise ConfigError("No topology: give --topology=v5p:8x8x8, or a config made for one.")
        try:
            topology = Topology.parse(name, flags.slices)
        except ValueError as error:
            raise ConfigError(f"--topology: {error}") from error
        if flags.calibrate:
            from internvl_jax.plan.calibrate import calibrate

            print(calibrate(topology))
            return 0
        if not 0 <= flags.phase < max(len(config.phases), 1):
            raise ConfigError(f"--phase={flags.phase}: this run has {len(config.phases)} phases.")
        if flags.sweep:
            if flags.sweep == "internvit":
                made = architecture_search(config, topology, flags.phase)
            else:
                made = sweep(config, topology, flags.sweep, flags.phase)
            found = []
            for i, (label, one) in enumerate(made, 1):
                print(f"{i}: {label}: {_short(one)}", file=sys.stderr, flush=True)
                found.append((label, one))
            found.sort(key=lambda item: order(item[1]))
            print(table(found))
            _write(flags.json, {label: _summary(one) for label, one in found})
            drawn = [(label, one) for label, one in found if not isinstance(one, Exception)]
        else:
            one = plan(
                resolve(config),
                topology,
                phase=flags.phase,
                dump=flags.dump or None,
                codegen=flags.codegen,
            )
            print(text(one))
            for line in one.cost.top(flags.top) if one.cost and flags.top else ():
                print(
                    f"{line.seconds:8.4f} s {line.kind:9} {line.executions:6} x "
                    f"{line.bytes / 1e9:8.1f} GB {line.op_name[-70:]} {line.code}"
                )
            _write(flags.json, one.summary())
            found = drawn = [(topology.name, one)]
        if flags.chart and drawn:
            chart(drawn, flags.chart)
    except PlanError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if any(not isinstance(p, Exception) and p.fits for _, p in found) else 1


def _rows(config: Any, flags: Any) -> int:
    """A list of plans with what each should reach."""
    from internvl_jax.chips import Topology
    from internvl_jax.plan.report import plan
    from internvl_jax.plan.show import chart, table
    from internvl_jax.plan.sweep import changed
    from internvl_jax.plan.sweep import run as run_all
    from internvl_jax.train.experiment import completed, resolve

    def job(row: Any):
        def make():
            settings = completed(load(row["config"]))
            settings = changed(settings, row.get("settings", {}).items())
            topology = Topology.parse(row.get("topology") or settings.topology)
            name = row["name"].replace(" ", "_").replace(":", "_").replace(",", "")
            dump = str(Path(flags.dump) / name) if flags.dump else None
            return plan(resolve(settings), topology, phase=row.get("phase", 0), dump=dump)

        return make

    rows = [dict(row) for row in config.rows]
    found, missed = [], 0
    for row, (label, one) in zip(rows, run_all([(r["name"], job(r)) for r in rows]), strict=True):
        reached = not isinstance(one, Exception) and one.fits and one.bound_a >= row["target"]
        missed += not reached
        words = f"target {row['target']:.2f} {'reached' if reached else 'MISSED'}"
        print(f"{label}: {_short(one)}; {words}", file=sys.stderr, flush=True)
        found.append((label, one))
    print(table(found))
    print(f"{len(rows) - missed} of {len(rows)} reach their target.")
    _write(flags.json, {label: _summary(one) for label, one in found})
    if flags.chart:
        chart([(n, p) for n, p in found if not isinstance(p, Exception)], flags.chart)
    return 0 if not missed else 1


def _short(plan: Any) -> str:
    if isinstance(plan, Exception):
        return str(plan)
    fits = "fits" if plan.fits else "does not fit"
    bound = "" if plan.cost is None else f", bound A {plan.bound_a:.3f}"
    return f"{fits}, {plan.hbm_peak:.1f} GiB{bound}"


def _summary(plan: Any) -> Any:
    return {"error": str(plan)} if isinstance(plan, Exception) else plan.summary()


def _write(path: str, value: Any) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, _flags, _fill)
