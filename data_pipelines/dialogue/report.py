"""What was found beside what was published, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipelines.dialogue.sets import PAPER, SETS


def listing() -> str:
    """The sets with their tasks and the sizes of their training splits, a line each."""
    lines = ["set              task                            training split"]
    for name, entry in SETS.items():
        size = f"{entry.size:,}" if entry.size else "?"
        note = "" if entry.paper else "  (not in the paper's Table 3)"
        lines.append(f"{name:16} {', '.join(entry.tasks):31} {size:>14}{note}")
    return "\n".join(lines)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Counts by set, then by task beside the paper's Table 3, then the reasons.

    Args:
        results: reports of `dialogue.write`.

    Returns:
        Lines of text.
    """
    lines = [f"{'set':16} {'written':>12} {'training split':>15} {'left out':>10}"]
    for result in results:
        size = SETS[result["set"]].size
        skipped = sum(result["skipped"].values())
        of = f"{size:,}" if size else "?"
        lines.append(f"{result['set']:16} {result['written']:12,} {of:>15} {skipped:10,}")
    lines += ["", f"{'task':20} {'written':>12} {'Table 3':>12} {'sets':>8}"]
    for task, count in PAPER.items():
        found = sum(result["tasks"].get(task, 0) for result in results)
        named = [name for name, entry in SETS.items() if task in entry.tasks and entry.paper]
        have = sum(result["set"] in named for result in results)
        lines.append(f"{task:20} {found:12,} {count:12,} {have:>3} of {len(named)}")
    total = sum(result["written"] for result in results)
    lines.append(f"{'all':20} {total:12,} {sum(PAPER.values()):12,}")
    for result in results:
        for reason, count in result["skipped"].items():
            example = result["examples"].get(reason, "")
            lines.append(f"\n{result['set']}: {count:,} left out, {reason}. First: {example}")
    return "\n".join(lines)
