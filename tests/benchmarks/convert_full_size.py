"""Both ways at true size: a checkpoint is exported, imported again and compared bit for bit.

    python -m tests.benchmarks.convert_full_size --folder runs/full_size

makes a checkpoint of InternVL-14B with random bfloat16 weights (28 GB), exports it under the
official names, removes it, imports what was exported and compares every leaf's SHA-256 with the
first one's. Each part runs in a process of its own, whose peak memory and speed are printed beside
what `cp` reaches on the same bytes. `--depth-divisor 12` does the same to a twelfth of the layers.
Needs twice the checkpoint's size on the disk. With GLIBC_TUNABLES=glibc.malloc.hugetlb=1 the
buffers of the reading library are faulted in by large pages, which saves a fifth of the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GIB = 2**30


def config(divisor: int) -> Any:
    """InternVL-14B with a part of its layers."""
    from internvl_jax.models import presets

    cfg = presets.internvl_14b_224()
    vision = dataclasses.replace(cfg.vision, depth=cfg.vision.depth // divisor)
    qllama = dataclasses.replace(cfg.qllama, depth=cfg.qllama.depth // divisor)
    return dataclasses.replace(cfg, vision=vision, qllama=qllama)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Finite bfloat16 values between 1/128 and 2 in size, of either sign."""
    bits = rng.integers(0, 2**16, shape, np.uint16) & 0x83FF
    return (bits | 0x3C00).view(ml_dtypes.bfloat16)


def make(folder: Path, divisor: int) -> None:
    """Writes the random checkpoint, a row in memory at a time."""
    from internvl_jax.checkpoint.writer import StepWriter
    from internvl_jax.convert.describe import described
    from internvl_jax.convert.key_maps import key_map
    from internvl_jax.models.definition import stacked

    cfg = config(divisor)
    rng = np.random.default_rng(0)
    writer = StepWriter(folder)
    for path, leaf in key_map(cfg, "hf").ours.items():
        shape = leaf.shape[1:] if stacked(path) else leaf.shape
        rows = (random_bits(rng, shape) for _ in range(leaf.shape[0] if stacked(path) else 1))
        dtype = "bfloat16" if leaf.shape else "float32"
        if not leaf.shape:
            rows = iter([np.asarray(2.5, np.float32)])
        writer.leaf(f"params/{path}", leaf.shape, dtype, rows)
    writer.commit(described(cfg))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every leaf, read by rows (each checked against its fingerprint)."""
    from internvl_jax.checkpoint import iter_leaves
    from internvl_jax.models.definition import stacked

    found = {}
    for leaf in iter_leaves(folder):
        digest = hashlib.sha256(f"{leaf.dtype}{leaf.shape}".encode())
        rows: Iterator[np.ndarray] = leaf.rows() if stacked(leaf.path) else iter([leaf.read()])
        for row in rows:
            digest.update(np.ascontiguousarray(row).reshape(-1).view(np.uint8).data)
        found[leaf.path] = digest.hexdigest()
    return found


def measured(name: str, command: list[str], size: int) -> dict[str, Any]:
    """Runs a command; its seconds, speed and peak memory."""
    print(f"$ {' '.join(command)}", flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{name} failed with status {os.waitstatus_to_exitcode(status)}.")
    row = dict(
        part=name,
        seconds=round(seconds, 1),
        gb_per_s=round(size / 1e9 / seconds, 3),
        peak_gib=round(usage.ru_maxrss * 1024 / GIB, 2),
    )
    print(json.dumps(row), flush=True)
    return row


def run(folder: Path, divisor: int) -> dict[str, Any]:
    """The whole journey. Raises SystemExit where something differs."""
    folder.mkdir(parents=True, exist_ok=True)
    here = [sys.executable, "-m", "tests.benchmarks.convert_full_size"]
    convert = [sys.executable, "-m", "internvl_jax.convert"]
    first, out, second = (folder / n for n in ("first", "exported", "second"))
    for old in (first, out, second):
        shutil.rmtree(old, ignore_errors=True)
    size = config(divisor).param_count() * 2
    options = ["--folder", str(folder), "--depth-divisor", str(divisor)]
    rows = [measured("make", [*here, *options, "--part", "make"], size)]
    rows += [measured("digest", [*here, *options, "--part", "digest-first"], size)]
    rows += [measured("export", [*convert, "export", str(first), str(out)], size)]
    shutil.rmtree(first)
    total = sum(p.stat().st_size for p in out.rglob("*"))
    # Ours is on the disk when it returns; cp alone leaves its last gigabytes in memory.
    for name, then in (("cp", ""), ("cp and sync", " && sync")):
        subprocess.run(["sync"], check=True)
        command = f"cp -r {shlex.quote(str(out))} {shlex.quote(str(folder / 'copy'))}{then}"
        rows += [measured(name, ["sh", "-c", command], total)]
        shutil.rmtree(folder / "copy")
    rows += [measured("import", [*convert, "import", str(out), str(second)], size)]
    rows += [measured("digest again", [*here, *options, "--part", "digest-second"], size)]
    before = json.loads((folder / "first.json").read_text())
    after = json.loads((folder / "second.json").read_text())
    different = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    report = dict(
        parameters=config(divisor).param_count(),
        exported_gb=round(total / 1e9, 2),
        leaves=len(before),
        different=different,
        parts=rows,
    )
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(out)
    shutil.rmtree(second)
    return report


def main() -> int:
    """The command; exit status 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--depth-divisor", type=int, default=1)
    parser.add_argument("--part", choices=("make", "digest-first", "digest-second"))
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.part == "make":
        make(folder / "first", arguments.depth_divisor)
    elif arguments.part:
        name = arguments.part.removeprefix("digest-")
        (folder / f"{name}.json").write_text(json.dumps(digests(folder / name)))
    else:
        report = run(folder, arguments.depth_divisor)
        print(json.dumps(report, indent=1))
        return 1 if report["different"] else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
