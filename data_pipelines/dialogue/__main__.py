"""Turns stage 3's annotation files into conversations, one ``conversations.jsonl`` per set.

``python -m data_pipelines.dialogue --root data/raw --out data/stage3``: reads every set that has a
folder of its name in ROOT (``--list`` shows the names), leaves out pictures of evaluation sets, and
reports what was found beside the counts of the paper's Table 3. A set that is done is kept as long
as its files and these settings stay as they were.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipelines.dialogue import held_out, report
from data_pipelines.dialogue.annotations import HELD_OUT, Annotations
from data_pipelines.dialogue.conversation import Conversation
from data_pipelines.dialogue.pictures import Pictures
from data_pipelines.dialogue.questions import UNBALANCED
from data_pipelines.dialogue.sets import SETS, gather, read

VERSION = 1
"""Raised when the same files give other conversations: sets are then written anew."""
LEFT_OUT = (HELD_OUT, UNBALANCED, "held-out picture", "missing picture")
"""Reasons that are no fault of the record."""
OUTPUT, REPORT = "conversations.jsonl", "report.json"


def write(
    name: str,
    folder: pathlib.Path,
    out: pathlib.Path,
    *,
    exclude: frozenset[str] = frozenset(),
    pictures: pathlib.Path | None = None,
    square: bool = True,
    rounds: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes one set, unless it is there already.

    Args:
        name: of the set.
        folder: of its annotation files.
        out: folder that gets ``conversations.jsonl`` and, once that is whole, ``report.json``.
        exclude: pictures to leave out, from `held_out.collect`.
        pictures: folder of pictures; conversations whose picture is not there are left out, and
            paths become those under which the pictures lie.
        square: whether pictures will be padded to squares; see `boxes`.
        rounds: questions on one picture that may share a conversation; see `sets.gather`.
        say: gets lines of progress.

    Returns:
        The report: written (conversations), tasks, skipped (reason -> count), examples (reason ->
        first message), files, settings.

    Raises:
        FileNotFoundError: if an annotation file is missing.
        ValueError: if one is damaged.
    """
    settings = {
        "version": VERSION,
        "exclude": hashlib.sha256("\n".join(sorted(exclude)).encode()).hexdigest()[:16],
        "pictures": str(pictures or ""),
        "square": square,
        "rounds": rounds,
    }
    done = _done(out, settings)
    if done is not None:
        say(f"{name}: kept, {done['written']:,} conversations")
        return done
    notes = Annotations(name, folder, square=square)
    lookup = Pictures(pictures) if pictures else None
    stream = _watched(read(notes, exclude), name, SETS[name].size, say)
    if rounds > 1:
        stream = gather(stream, rounds)
    tasks: collections.Counter[str] = collections.Counter()
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f"{OUTPUT}.tmp"
    # Half a surrogate pair is legal JSON, and no UTF-8.
    with open(unfinished, "w", encoding="utf-8", errors="replace") as file:
        for conversation in stream:
            record = conversation.to_json()
            if lookup is not None and conversation.images:
                found = [lookup.find(path) for path in conversation.images]
                if None in found:
                    path = conversation.images[found.index(None)]
                    notes.skip("missing picture", f"{name} {conversation.id} shows {path}.")
                    continue
                record["image"] = found[0] if len(found) == 1 else found
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            tasks[conversation.task] += 1
    os.replace(unfinished, out / OUTPUT)
    result = {
        "set": name,
        "written": sum(tasks.values()),
        "tasks": dict(tasks),
        "skipped": dict(notes.skipped.most_common()),
        "examples": notes.examples,
        "files": {str(path): _stamp(path) for path in list(notes.files)[:1000]},
        "settings": settings,
    }
    (out / REPORT).write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"{name}: {result['written']:,} conversations, {sum(notes.skipped.values()):,} left out")
    return result


def bad_share(result: dict[str, Any]) -> float:
    """The share of a set's records that were bad, 0 to 1.

    Args:
        result: the report of `write`.

    Returns:
        Bad ones over all that were meant to be read.
    """
    bad = sum(count for reason, count in result["skipped"].items() if reason not in LEFT_OUT)
    return bad / max(bad + result["written"], 1)


def _stamp(path: pathlib.Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _done(out: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    try:
        result = json.loads((out / REPORT).read_text(encoding="utf-8"))
        same = all(_stamp(pathlib.Path(p)) == stamp for p, stamp in result["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    whole = (out / OUTPUT).is_file() and result.get("settings") == settings
    return result if same and whole else None


def _watched(
    conversations: Iterator[Conversation], name: str, size: int, say: Callable[[str], None]
) -> Iterator[Conversation]:
    started = shown = 0.0  # from the first conversation: some sets read other files before
    for count, conversation in enumerate(conversations):
        yield conversation
        now = time.monotonic()
        if not count:
            started = shown = now
        elif now - shown > 5:
            shown, rate = now, count / (now - started)
            left = f" of about {size:,}, {max(size - count, 0) / rate:.0f} s left" if size else ""
            say(f"{name}: {count:,} conversations{left}, {rate:,.0f}/s")


def _folders(names: Sequence[str], root: pathlib.Path) -> dict[str, pathlib.Path]:
    given: dict[str, str] = {}
    for part in names:
        name, _, folder = part.partition("=")
        given[name] = folder
    for name in given:
        if name not in SETS:
            raise ValueError(f"The set {name!r} is unknown; choose from {', '.join(SETS)}.")
    if not given:
        given = {name: "" for name, entry in SETS.items() if entry.paper and (root / name).is_dir()}
    if not given:
        raise FileNotFoundError(f"{root} has no folder named like a set; see --list.")
    return {name: pathlib.Path(folder or root / name) for name, folder in given.items()}


def _excluded(options: argparse.Namespace, say: Callable[[str], None]) -> frozenset[str]:
    if options.nothing_held_out:
        return frozenset()
    files = options.held_out or held_out.find(options.root)
    if not files:
        raise FileNotFoundError(
            f"No file under {options.root} tells which pictures are held out (refs(unc).p, "
            "dataset_coco.json, …); name some with --held_out, or say --nothing_held_out."
        )
    pictures = held_out.collect(files)
    for path, count in pictures.files:
        say(f"held out: {count:,} pictures by {path}")
    return pictures.keys


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: instead of those of the process.

    Returns:
        The exit code: 0 done, 65 if a set has too many bad records, 78 if something is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.dialogue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    path, add = pathlib.Path, parser.add_argument
    add("sets", nargs="*", metavar="SET[=FOLDER]", help="default: every set with a folder in ROOT")
    add("--root", type=path, default=path("data/raw"), help="folders named after sets (data/raw)")
    add("--out", type=path, default=path("data/stage3"), help="default: data/stage3")
    add("--images", type=path, help="leave out what has no picture in this folder")
    add("--held_out", type=path, nargs="+", help="files that say so (default: those in ROOT)")
    add("--nothing_held_out", action="store_true", help="do not look for such files")
    frames = "boxes are shares of the picture padded to a square (default), or of the picture"
    add("--boxes", choices=("square", "picture"), default="square", help=frames)
    add("--rounds", type=int, default=1, help="join up to so many questions on a picture (1)")
    add("--max_bad", type=float, default=0.05, help="share of a set's records, then 65 (0.05)")
    add("--list", action="store_true", help="show the sets")
    options = parser.parse_args(arguments)
    if options.list:
        print(report.listing())
        return 0
    results = []
    try:
        folders = _folders(options.sets, options.root)
        exclude = _excluded(options, print)
        for name, folder in folders.items():
            result = write(
                name,
                folder,
                options.out / name,
                exclude=exclude,
                pictures=options.images,
                square=options.boxes == "square",
                rounds=max(options.rounds, 1),
            )
            results.append(result)
    except (OSError, ValueError) as error:
        print(f"dialogue: {error}", file=sys.stderr)
        return 78
    finally:
        if results:
            print(report.table(results))
    worst = max(results, key=bad_share)
    if bad_share(worst) > options.max_bad:
        print(
            f"dialogue: {bad_share(worst):.0%} of the records of {worst['set']} are bad, more than "
            f"{options.max_bad:.0%}; {OUTPUT} holds the others, the report above says why.",
            file=sys.stderr,
        )
        return 65
    return 0


if __name__ == "__main__":
    sys.exit(main())
