"""A million records, good and hostile: every one is accounted for, and memory stays flat.

    python -m tests.benchmarks.soak --folder /big/disk --records 1000000

Writes tars as img2dataset does, indexes them, and goes through one epoch of the stage-1 pipeline.
What every record is follows from its number, so the counts by reason have to be exact.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import pathlib
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
from PIL import Image

from data_pipelines import text
from data_pipelines.pipeline import make_pipeline

SHARD = 10_000
BATCH = 500


def pictures() -> dict[str, list[bytes]]:
    """Encoded pictures by what should become of them: "" is fine, else the reason."""
    rng = np.random.default_rng(0)

    def draw(mode: str, format: str, size: tuple[int, int] = (72, 64), **options) -> bytes:
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [draw("RGB", "JPEG", quality=int(q)) for q in rng.integers(70, 96, 300)]
    deep = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (20, 30)).astype(np.uint16)).save(deep, "PNG")
    frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in (0, 90)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    bomb += b"\x00\x00\x00\x00IEND\xaeB`\x82"
    return {
        "": [
            *jpegs,
            draw("RGB", "JPEG", exif=exif.tobytes()),
            draw("CMYK", "JPEG"),
            draw("L", "JPEG"),
            draw("RGBA", "PNG"),
            draw("P", "PNG"),
            draw("RGB", "WEBP"),
            draw("RGB", "PNG", (1, 1)),
            draw("RGB", "JPEG", (2000, 2)),
            deep.getvalue(),
            moving.getvalue(),
        ],
        "truncated": [data[: len(data) // 2] for data in jpegs[:20]],
        "not a picture": [
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"<!doctype html><title>404</title>",
            b"\x00" * 4096,
            bytes(rng.integers(0, 256, 3000, np.uint8)),
        ],
        "too large": [bomb],
    }


TEXTS = {
    "missing caption": None,
    "empty caption": b" \n ",
    "encoding": b"\xff\xfe\xfa broken",
}


def kind_of(number: int) -> str:
    """What record ``number`` is: "" in about 95 of 100 cases."""
    rng = np.random.default_rng((7, number))
    if rng.random() < 0.95:
        return ""
    kinds = ("truncated", "not a picture", "too large", "missing image", *TEXTS)
    return kinds[int(rng.integers(len(kinds)))]


def write_shard(path: pathlib.Path, first: int, count: int, kept: dict[str, list[bytes]]) -> None:
    """One tar; some names are long, some captions huge."""
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            kind = kind_of(number)
            key = f"{number:09d}" if number % 97 else f"{'long/' * 30}{number:09d}"
            choice = kept[kind if kind in kept else ""]
            caption = TEXTS.get(
                kind, f"number {number} ".encode() * (1 + 999 * (number % 5003 == 0))
            )
            members = {
                "jpg": None if kind == "missing image" else choice[number % len(choice)],
                "txt": caption,
                "json": json.dumps({"key": key, "number": number}).encode(),
            }
            for extension, data in members.items():
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def resident() -> float:
    """MB of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def soak(folder: pathlib.Path, records: int, threads: int = 2) -> dict:
    """Writes, indexes, reads; returns counts by reason, expected and found, and memory by step."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = pictures()
    started = time.monotonic()
    for first in range(0, records, SHARD):
        path = folder / f"{first // SHARD:05d}.tar"
        if not path.is_file():
            writing = path.with_suffix(".tmp")
            write_shard(writing, first, min(SHARD, records - first), kept)
            writing.rename(path)
    print(f"written after {time.monotonic() - started:.0f} s", flush=True)
    command = [sys.executable, "-m", "data_pipelines.build", "index", str(folder)]
    subprocess.run(command, check=True)
    model = folder / "tokenizer.model"
    if not model.is_file():
        text.train([f"number {i}" for i in range(2000)], model, vocab_size=320)

    config = {
        "dataset": str(folder),
        "tokenizer": str(model),
        "image_size": 64,
        "text_length": 16,
        "threads": threads,
    }
    pipeline = make_pipeline(config, "contrastive", global_batch=BATCH, seed=0)
    steps, first = records // BATCH, resident()
    seen = np.zeros(records, np.int32)
    found: collections.Counter[str] = collections.Counter()
    memory, started, cpu = [], time.monotonic(), time.process_time()
    for step, batch in zip(range(steps), pipeline.iterate()):
        found.update(batch.reasons)
        np.add.at(seen, batch.records[batch.valid], 1)
        if step % max(steps // 50, 1) == 0:
            memory.append(resident())
            rate = (step + 1) * BATCH / (time.monotonic() - started)
            left = (steps - step) * BATCH / rate
            print(
                f"{(step + 1) * BATCH:,} records, {rate:.0f}/s, {left:.0f} s left, "
                f"{memory[-1]:.0f} MB",
                flush=True,
            )
    pipeline.close()
    kinds = [kind_of(number) for number in range(records)]
    good = np.asarray([not kind for kind in kinds])
    expected = collections.Counter(kind for kind in kinds if kind)
    return {
        "records": records,
        "seen_once": bool((seen == good).all()),
        "expected": dict(sorted(expected.items())),
        "found": dict(sorted(found.items())),
        "cpu_ms": 1e3 * (time.process_time() - cpu) / records,
        "resident_mb": [round(first), *(round(mb) for mb in memory)],
    }


def main() -> int:
    """The command line; 1 if a record is unaccounted for or memory grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--records", type=int, default=1_000_000)
    options = parser.parse_args()
    result = soak(options.folder, options.records)
    print(json.dumps(result, indent=1))
    memory = result["resident_mb"]
    middle, end = max(memory[len(memory) // 4 : len(memory) // 2]), max(memory[len(memory) // 2 :])
    flat = end < 1.05 * middle
    print(f"memory: at most {middle} MB in the second quarter, {end} MB in the second half")
    return 0 if result["seen_once"] and result["expected"] == result["found"] and flat else 1


if __name__ == "__main__":
    sys.exit(main())
