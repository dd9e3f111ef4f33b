"""The demo's stage-1 step against PyTorch and open_clip, taking turns on the same CPU cores.

    python -m tests.benchmarks.cpu_step [--rounds 30] [--json FILE]

Same size, batch, precision and threads; every side runs a few steps per round, in an order that
rotates, so that whatever else the machine does meets all of them. Needs the extra `torch`;
open_clip where `open_clip_torch` is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import pathlib
import platform
import statistics
import time
from typing import Any

KEEPS = {"masked": 1 / 3, "unmasked": 1.0}


def measure(
    sides: list[str], *, rounds: int, count: int, batch: int, threads: int, whats: list[str]
) -> dict[str, Any]:
    """Medians over the rounds.

    Args:
        sides: of `sides.SIDES`, ours first.
        rounds: turns of every side in every phase.
        count: steps a turn.
        batch: B.
        threads: of every side.
        whats: "step", "forward".

    Returns:
        ``versions``, ``seconds`` (phase -> side -> wall and cpu per step), ``ratios`` (phase ->
        side -> wall and cpu, medians over the rounds of its seconds over ours: above 1, ours is
        faster). On a machine that does other work besides, trust cpu.
    """
    from tests.benchmarks.workers import Spent, Worker

    workers = {side: Worker(side, batch=batch, threads=threads) for side in sides}
    cases = list(itertools.product(whats, KEEPS))
    try:
        prepare = {
            f"{phase} {what}": {
                side: worker("prepare", KEEPS[phase], what).wall for side, worker in workers.items()
            }
            for what, phase in cases
        }
        spent: dict[str, dict[str, list[Spent]]] = {
            f"{phase} {what}": {side: [] for side in sides} for what, phase in cases
        }
        for turn in range(rounds):
            order = sides[turn % len(sides) :] + sides[: turn % len(sides)]
            for (what, phase), side in itertools.product(cases, order):
                seconds = workers[side]("measure", KEEPS[phase], what, count)
                spent[f"{phase} {what}"][side].append(
                    Spent(seconds.wall / count, seconds.cpu / count)
                )
                time.sleep(0.05)  # the others' threads stop spinning
    finally:
        for worker in workers.values():
            worker.close()
    seconds = {
        case: {
            side: {
                "wall": statistics.median(s.wall for s in found),
                "cpu": statistics.median(s.cpu for s in found),
            }
            for side, found in by_side.items()
        }
        for case, by_side in spent.items()
    }
    ratios = {
        case: {
            side: {
                kind: statistics.median(
                    getattr(a, kind) / getattr(b, kind)
                    for a, b in zip(by_side[side], by_side[sides[0]])
                )
                for kind in ("wall", "cpu")
            }
            for side in sides[1:]
        }
        for case, by_side in spent.items()
    }
    return {
        "versions": {"python": platform.python_version()}
        | {side: worker.version for side, worker in workers.items()},
        "settings": dict(rounds=rounds, count=count, batch=batch, threads=threads),
        "first_calls": prepare,
        "seconds": seconds,
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the medians."""
    print(", ".join(f"{name}: {version}" for name, version in result["versions"].items()))
    for case, by_side in result["seconds"].items():
        print(f"\n{case}")
        for side, s in by_side.items():
            ratio = result["ratios"][case].get(side)
            against = ""
            if ratio is not None:
                against = f"   ours is {ratio['wall']:.2f}x as fast ({ratio['cpu']:.2f}x by CPU)"
            print(
                f"  {side:15} {1 / s['wall']:7.2f}/s  {1000 * s['wall']:7.1f} ms, "
                f"CPU {1000 * s['cpu']:7.1f} ms{against}"
            )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=4, help="steps a turn")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default="", help="e.g. ours,torch; all that are installed")
    parser.add_argument("--what", default="step,forward")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()

    from tests.benchmarks.workers import same_conditions

    same_conditions("tests.benchmarks.cpu_step", args.threads)
    sides = [side for side in args.sides.split(",") if side] or installed()
    result = measure(
        sides,
        rounds=args.rounds,
        count=args.count,
        batch=args.batch,
        threads=args.threads,
        whats=args.what.split(","),
    )
    show(result)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def installed() -> list[str]:
    """The sides that can run here."""
    known = importlib.util.find_spec
    return ["ours"] + ["torch"] * bool(known("torch")) + ["open_clip"] * bool(known("open_clip"))


if __name__ == "__main__":
    main()
