"""Times the stages of the image path, and whole loaders against others, on the same shards.

    python -m data_pipelines.benchmark --pictures 2000 --side 256 --peer open_clip=PYTHON

Loaders take turns, pass by pass, and the least CPU time of a picture counts (threads and decoders
included): other programs on the machine then spoil single passes, not the comparison. The shards
are made for the occasion: pictures with the spectrum and the edges of photos as JPEG, in tars as
img2dataset writes them. Peers:

===========  =======================================================================================
webdataset   its stream of tars, PIL, bicubic crop, float32 normalised by numpy, and our tokenizer
open_clip    its own training loader, transforms and tokenizer, in another interpreter
tensorflow   tf.data over TFRecords, bicubic with antialiasing, uint8, no texts, in another
             interpreter
===========  =======================================================================================

``--peer NAME=PYTHON`` names the interpreters, which have open_clip or TensorFlow installed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.benchmark.loaders import PEERS, Peer, ours, stages, webdataset_style
from data_pipelines.benchmark.shards import photo, write_shards

RATIOS = (0.5, 0.8, 1.14, 1.5, 2.0, 3.0, 5.0)


def timed(run: Callable[[], int]) -> tuple[float, float]:
    """CPU (all threads) and wall seconds per picture of one pass."""
    cpu, wall = time.process_time(), time.perf_counter()
    count = run()
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def errors(side: int = 400, pictures: int = 8) -> dict[float, float]:
    """How far "fast" is from PIL's bicubic.

    Args:
        side: of the pictures before, in pixels.
        pictures: how many to average over.

    Returns:
        How many times smaller the result is -> mean absolute error, of 255.
    """
    from data_pipelines.image import resize_square

    out = {}
    for ratio in RATIOS:
        found = []
        for seed in range(pictures):
            pixels, size = photo(np.random.default_rng(seed), side, side), round(side / ratio)
            exact = resize_square(pixels, size, "exact").astype(int)
            found.append(np.abs(exact - resize_square(pixels, size, "fast")).mean())
        out[ratio] = float(np.mean(found))
    return out


def compare(passes: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, Any]:
    """Runs passes in turns.

    Args:
        passes: name -> a pass, which gives CPU and wall seconds per picture.
        rounds: how many of each.

    Returns:
        Name -> {"cpu_ms", "wall_ms"} per picture, the least of all rounds.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    began = time.perf_counter()
    for done in range(rounds):
        for name, run in passes.items():
            found[name].append(run())
        spent = time.perf_counter() - began
        left = spent / (done + 1) * (rounds - done - 1)
        print(f"round {done + 1}/{rounds}, {left:.0f} s left", file=sys.stderr)
    return {
        name: dict(zip(("cpu_ms", "wall_ms"), (1e3 * min(column) for column in zip(*times))))
        for name, times in found.items()
    }


def measure(
    folder: pathlib.Path, scratch: pathlib.Path, size: int, rounds: int, peers: dict[str, str]
) -> dict[str, Any]:
    """Measures everything.

    Args:
        folder: with shards of `write_shards`.
        scratch: for their index.
        size: side of a picture in pixels after the crop.
        rounds: passes of each loader.
        peers: name in `PEERS` -> interpreter.

    Returns:
        "stages" and "loaders" as `compare` gives them, "errors" as `errors`, "notes".

    Raises:
        OSError: if an interpreter does not start.
    """
    from data_pipelines.build.index import index
    from data_pipelines.manifest import open_corpus
    from data_pipelines.text import train

    notes = []
    index(str(folder), str(scratch), max_bad=0.0)
    corpus = open_corpus(scratch)
    captions = [corpus.sample(n).captions[0].text for n in range(min(500, len(corpus)))]
    tokenizer = train(captions, scratch / "tokenizer.model", vocab_size=300)
    runs = {
        "ours, 1 thread": ours(scratch, tokenizer, size, "fast", 1),
        "ours, 2 threads": ours(scratch, tokenizer, size, "fast", 2),
        "ours, exact": ours(scratch, tokenizer, size, "exact", 1),
    }
    try:
        runs["webdataset, PIL, float32"] = webdataset_style(folder, tokenizer, size)
    except ImportError:
        notes.append("webdataset is not installed: its loader is left out.")
    loaders: dict[str, Callable[[], tuple[float, float]]] = {
        name: lambda run=run: timed(run) for name, run in runs.items()
    }
    started: dict[str, Peer] = {}
    try:
        for environment, python in peers.items():
            for name, script in PEERS[environment].items():
                started[name] = Peer(python, *script, folder=folder, size=size)
            notes.append(f"{started[name].version}.")
        loaders |= started
        steps = {
            name: lambda run=run: timed(run)
            for name, run in stages(corpus, tokenizer, size).items()
        }
        return {
            "loaders": compare(loaders, rounds),
            "stages": compare(steps, 3 * rounds),
            "errors": errors(),
            "notes": notes,
        }
    finally:
        corpus.close()
        for peer in started.values():
            peer.close()


def show(result: dict[str, Any]) -> str:
    """The tables to print."""
    first = result["loaders"]["ours, 1 thread"]["cpu_ms"]
    lines = [f"{'loader':28}{'CPU ms':>8}{'per core':>10}{'wall ms':>9}{'CPU, × ours':>13}"]
    for name, t in result["loaders"].items():
        cpu, wall = t["cpu_ms"], t["wall_ms"]
        lines.append(f"{name:28}{cpu:8.3f}{1e3 / cpu:8.0f}/s{wall:9.3f}{cpu / first:13.2f}")
    lines += ["", f"{'stage':28}{'CPU ms':>8}"]
    lines += [f"{name:28}{t['cpu_ms']:8.3f}" for name, t in result["stages"].items()]
    lines += ["", '"fast" from PIL\'s bicubic, mean absolute error of 255:']
    lines += [f"  {ratio:4.2f} × smaller {error:8.3f}" for ratio, error in result["errors"].items()]
    return "\n".join([*lines, *result["notes"]])


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: instead of those of the process.

    Returns:
        The exit code: 0 done, 78 if something is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256, help="of the pictures in the shards")
    parser.add_argument("--size", type=int, default=224, help="of the pictures in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=pathlib.Path, help="measure these tars; none are made")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    peers = dict(pair.partition("=")[::2] for pair in options.peer)
    if not peers.keys() <= PEERS.keys():
        print(f"--peer takes {' or '.join(PEERS)}, and =PYTHON.", file=sys.stderr)
        return 78
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.shards or pathlib.Path(scratch) / "shards"
            if not options.shards:
                print(f"making {options.pictures} pictures", file=sys.stderr)
                write_shards(folder, options.pictures, options.side)
            elif not any(folder.glob("*.tar")):
                raise FileNotFoundError(f"{folder} has no tars.")
            result = measure(folder, pathlib.Path(scratch), options.size, options.rounds, peers)
    except OSError as error:
        print(error, file=sys.stderr)
        return 78
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
