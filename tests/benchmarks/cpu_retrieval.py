"""Name retrieval after equal CPU-seconds of training: ours, compact PyTorch and open_clip.

    python -m tests.benchmarks.cpu_retrieval --data data --tokenizer runs/demo/tokenizer.model

All start from scratch with the same seed, batches, schedule and rates, in two phases as the demo's
stage 1, and are judged on the vendor that was never trained on. Needs the data and the tokenizer
that `make demo` makes first. A few steps of each side say how many fit into its CPU-seconds; they,
compilation and the making of batches do not count.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from typing import Any

BATCH, TURN = 128, 25
SHARE = 0.93
"""Of the steps are masked, as in the demo."""


def steps_that_fit(sides: list[str], seconds: float, threads: int, probes: int) -> dict[str, int]:
    """How many steps each side takes in so many CPU-seconds, from alternating probes."""
    from tests.benchmarks.workers import Worker

    workers = [Worker(side, batch=BATCH, threads=threads) for side in sides]
    found: dict[str, dict[float, list[float]]] = {w.name: {1 / 3: [], 1.0: []} for w in workers}
    for worker in workers:
        for keep in (1 / 3, 1.0):
            worker("prepare", keep, "step")
    for _ in range(probes):
        for worker in workers:
            for keep, costs in found[worker.name].items():
                costs.append(worker("measure", keep, "step", 2).cpu / 2)
    for worker in workers:
        worker.close()
    cost = {
        name: SHARE * statistics.median(by_keep[1 / 3])
        + (1 - SHARE) * statistics.median(by_keep[1.0])
        for name, by_keep in found.items()
    }
    return {name: round(seconds / c) for name, c in cost.items()}


def measure(
    sides: list[str],
    data: dict[str, Any],
    *,
    seconds: float,
    threads: int,
    probes: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains the sides in turns and judges them.

    Args:
        sides: of `sides.SIDES`.
        data: settings of the data pipeline.
        seconds: CPU-seconds of training for each.
        threads: of each.
        probes: alternating measurements of two steps that set the number of steps.
        seed: of parameters, masks and data.

    Returns:
        Per side its version, steps, CPU-seconds (training, compiling), loss and figures.
    """
    from tests.benchmarks.workers import Worker

    steps = steps_that_fit(sides, seconds, threads, probes)
    workers = [
        Worker(side, batch=BATCH, threads=threads, steps=steps[side], seed=seed) for side in sides
    ]
    out: dict[str, Any] = {}
    for worker in workers:
        compiling = [worker("compile", keep).cpu for keep in (1 / 3, 1.0)]
        out[worker.name] = dict(
            version=worker.version, steps=steps[worker.name], compile_cpu=sum(compiling), cpu=0.0
        )
    ends = {name: (round(SHARE * count), count) for name, count in steps.items()}
    for phase, keep in enumerate((1 / 3, 1.0)):
        done = {name: phase and ends[name][0] for name in steps}
        while any(done[name] < ends[name][phase] for name in steps):
            for worker in workers:
                name = worker.name
                count = min(TURN, ends[name][phase] - done[name])
                if count:
                    spent, loss = worker("train", data, done[name], count, keep)
                    done[name] += count
                    out[name]["cpu"] += spent.cpu
                    out[name]["loss"] = loss
            print(", ".join(f"{k} {v}/{ends[k][1]}" for k, v in done.items()), flush=True)
    for worker in workers:
        out[worker.name]["figures"] = worker("judge", data)
        worker.close()
    return {"settings": dict(seconds=seconds, threads=threads, seed=seed), "sides": out}


def show(result: dict[str, Any], languages: tuple[str, ...]) -> None:
    """Prints R@10 by language, picture -> name, and what it cost."""
    for name, side in result["sides"].items():
        recall = [100 * side["figures"][f"fluent.{code}.i2t_R@10"] for code in languages]
        by_language = "  ".join(f"{code} {r:5.1f}" for code, r in zip(languages, recall))
        print(
            f"{name:15} R@10 {statistics.mean(recall):5.1f} ({by_language})   "
            f"{side['steps']} steps, {side['cpu']:.0f} CPU-s, and {side['compile_cpu']:.0f} "
            f"compiling; {side['version']}"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="data", help="where the demo's data set was built")
    parser.add_argument("--tokenizer", default="runs/demo/tokenizer.model")
    parser.add_argument("--seconds", type=float, default=120, help="CPU-seconds for each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", default="", help="e.g. ours,torch; all that are installed")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()

    from tests.benchmarks.workers import same_conditions

    same_conditions("tests.benchmarks.cpu_retrieval", args.threads)
    from tests.benchmarks.cpu_step import installed
    from tests.benchmarks.sides import demo, demo_stage

    experiment = demo()
    data = experiment.data_config(demo_stage(1.0))
    data |= dict(data_dir=args.data, tokenizer=args.tokenizer)
    sides = [side for side in args.sides.split(",") if side] or installed()
    result = measure(sides, data, seconds=args.seconds, threads=args.threads, seed=args.seed)
    show(result, data["languages"])
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
