"""Filter and exact duplicates on synthetic rows of LAION's schema: ours, pandas, DuckDB.

    python -m tests.benchmarks.clean_rows --rows 20000000 --folder /somewhere/with/6GB

Every side reads the same parquet parts, applies the same six signals, keeps one row of every URL
and writes parquet, in a process of its own, one after the other: CPU seconds are those of the
process and its children, memory is its peak resident set. Ours compares normalised URLs, makes
uids, and counts drops by reason; "pandas" does the same, vectorised, with pandas' own hash. "pandas
less" and "duckdb" compare URLs as they are, make no uids and count nothing. Pandas holds everything
in memory, so it gets fewer rows (`--pandas_rows`), twice: the second shows how its memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

PART = 1_000_000
CORPUS = 6.03e9
LIMITS = dict(similarity=0.24, watermark=0.9, unsafe=0.9, aesthetic=3.5, side=64, aspect=3.0)
LEAST, MOST = 3, 1000


def write_part(path: pathlib.Path, number: int) -> None:
    """One part: about 8 % of its URLs are elsewhere too, an eighth of the scores is null."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rng = np.random.default_rng(number)
    text = "the a of in with and for on new old red blue black white vintage photo print poster "
    text += "wall art home design dog cat beach sunset city street wooden table chair dress shirt "
    words = np.array((text + "women men kids toy car engine parts 2019 stock image").split(" "))
    captions = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 24, 20_000)]
    texts = pa.array(captions).take(pa.array(rng.integers(0, len(captions), PART)))
    serial = pc.cast(pa.array(np.arange(PART) + number * PART), pa.string())
    hosts = [f"https://{w}images{i}.example{i % 7}.com" for i in range(5000) for w in ("", "www.")]
    # The picture's number decides the rest of its URL, so that a number drawn twice is a duplicate.
    drawn = rng.integers(0, 120_000_000, PART)
    host = pa.array(hosts).take(pa.array(drawn % len(hosts)))
    # A quarter has capitals in its path, as identifiers do.
    place = pa.array(["wp-content/uploads/2019/07"] * 3 + ["files/AbX9z_Kq"]).take(
        pa.array(drawn % 4)
    )
    identity = pc.utf8_lpad(pc.cast(pa.array(drawn), pa.string()), 12, "0")
    url = pc.binary_join_element_wise(host, place, identity, "product-photo-large-800x600.jpg", "/")

    def score(low, high, kind):
        return pa.array(rng.uniform(low, high, PART).astype(kind), mask=rng.random(PART) < 0.125)

    table = pa.table(
        {
            "SAMPLE_ID": pc.cast(serial, pa.int64()),
            "URL": url,
            "TEXT": texts,
            "HEIGHT": pa.array(rng.integers(40, 1600, PART).astype(np.int32)),
            "WIDTH": pa.array(rng.integers(40, 1600, PART).astype(np.int32)),
            "LICENSE": pa.repeat("?", PART),
            "NSFW": pa.array(["UNLIKELY", "UNSURE", "NSFW"]).take(
                pa.array(rng.choice(3, PART, p=[0.93, 0.05, 0.02]))
            ),
            "similarity": score(0.235, 0.45, "f8"),
            "hash": pa.array(rng.integers(-(2**62), 2**62, PART)),
            "punsafe": score(0, 0.95, "f4"),
            "pwatermark": score(0, 0.95, "f4"),
            "aesthetic": score(3.2, 8, "f4"),
        }
    )
    pq.write_table(table, path, compression="snappy")


def ours(files: list[str], out: str, workers: int) -> int:
    """Our local driver with the thresholds above."""
    from data_pipelines.clean import local
    from data_pipelines.clean.config import CleanConfig, Signals, Source
    from data_pipelines.clean.report import make_report

    config = CleanConfig(
        stage=1,
        output=out,
        order=("laion_en",),
        sources={"laion_en": Source(tuple(files))},
        signals=Signals(**LIMITS, least_chars=LEAST, most_chars=MOST),
        workers=workers,
    )
    return make_report(config, local.run(config))["sources"]["all"]["kept"]


def pandas(files: list[str], out: str, less: bool) -> int:
    """Vectorised pandas with Arrow strings, the whole table in memory."""
    import numpy as np
    import pandas as pd

    columns = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "aesthetic"]
    kept, dropped = [], {}
    for path in files:
        t = pd.read_parquet(path, columns=columns)
        short, long = t[["WIDTH", "HEIGHT"]].min(axis=1), t[["WIDTH", "HEIGHT"]].max(axis=1)
        length = t["TEXT"].str.strip().str.len()
        drops = {
            "no_url": t["URL"].isna(),
            "no_caption": t["TEXT"].isna(),
            "similarity": t["similarity"] < LIMITS["similarity"],
            "watermark": t["pwatermark"] > LIMITS["watermark"],
            "unsafe": t["punsafe"] > LIMITS["unsafe"],
            "aesthetic": t["aesthetic"] < LIMITS["aesthetic"],
            "resolution": short < LIMITS["side"],
            "aspect": long > LIMITS["aspect"] * short,
            "caption_length": (length < LEAST) | (length > MOST),
        }
        gone = np.zeros(len(t), bool)
        for reason, mask in drops.items():
            mask = mask.to_numpy(bool)
            if not less:
                dropped[reason] = dropped.get(reason, 0) + int((mask & ~gone).sum())
            gone |= mask
        kept.append(t[~gone])
    whole = pd.concat(kept, ignore_index=True)
    del kept
    if less:
        whole = whole.drop_duplicates("URL")
    else:
        rest = whole["URL"].str.strip().str.replace(r"^[a-zA-Z][a-zA-Z0-9+.-]*://", "", regex=True)
        rest = rest.str.split("#", n=1).str[0].str.partition("/")
        host = rest[0].str.lower().str.removeprefix("www.")
        host = host.str.replace(r":(80|443)$", "", regex=True)
        whole = whole[~(host + (rest[1] + rest[2]).str.rstrip("/")).duplicated()]
        for name, column in (("uid0", "URL"), ("uid1", "TEXT")):
            whole = whole.assign(**{name: pd.util.hash_array(whole[column].to_numpy(object))})
    os.makedirs(out)
    whole.to_parquet(f"{out}/kept.parquet")
    return len(whole)


def duckdb(files: list[str], out: str) -> int:
    """DuckDB with one thread and 1.5 GB; which row of a URL stays is not defined."""
    import duckdb

    os.makedirs(out)
    connection = duckdb.connect()
    connection.sql(
        f"SET threads=1; SET memory_limit='1500MB'; SET temp_directory='{out}/temp'; "
        "SET preserve_insertion_order=false"
    )
    x = LIMITS
    connection.sql(
        f"""COPY (SELECT DISTINCT ON (URL) URL, TEXT, WIDTH, HEIGHT, similarity, punsafe,
        pwatermark, aesthetic FROM read_parquet({files!r})
        WHERE URL IS NOT NULL AND TEXT IS NOT NULL
        AND coalesce(similarity >= {x["similarity"]}, true)
        AND coalesce(pwatermark <= {x["watermark"]}, true)
        AND coalesce(punsafe <= {x["unsafe"]}, true)
        AND coalesce(aesthetic >= {x["aesthetic"]}, true)
        AND coalesce(least(WIDTH, HEIGHT) >= {x["side"]}, true)
        AND coalesce(greatest(WIDTH, HEIGHT) <= {x["aspect"]} * least(WIDTH, HEIGHT), true)
        AND length(trim(TEXT)) BETWEEN {LEAST} AND {MOST})
        TO '{out}/kept.parquet' (FORMAT parquet)"""
    )
    found = connection.sql(f"SELECT count(*) FROM '{out}/kept.parquet'").fetchall()
    return found[0][0]


def measure(side: str, files: list[str], out: pathlib.Path) -> dict:
    """Runs a side in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = [sys.executable, "-m", "tests.benchmarks.clean_rows", "--side", side]
    process = subprocess.Popen(
        [*arguments, "--out", str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    began = time.monotonic()
    process.stdin.write(json.dumps(files))
    process.stdin.close()
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    shutil.rmtree(out, ignore_errors=True)
    if status:
        raise RuntimeError(f"{side} ended with {status}: {printed[-500:]}")
    rows, cpu = len(files) * PART, usage.ru_utime + usage.ru_stime
    return {
        "side": side,
        "rows": rows,
        "kept": int(printed.strip().splitlines()[-1]),
        "cpu_s": round(cpu, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "rows_per_core_s": round(rows / cpu),
        "peak_mb": usage.ru_maxrss // 1024,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--pandas_rows", type=int, default=4_000_000)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/clean_rows"))
    parser.add_argument("--keep", action="store_true", help="do not remove the parts")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        files = json.load(sys.stdin)
        sides = {
            "ours": lambda: ours(files, options.out, 1),
            "pandas": lambda: pandas(files, options.out, False),
            "pandas less": lambda: pandas(files, options.out, True),
            "duckdb": lambda: duckdb(files, options.out),
        }
        print(sides[options.side]())
        return
    parts = options.folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(options.rows // PART):
        path = parts / f"{number:05d}.parquet"
        if not path.exists():
            write_part(path, number)
        files.append(str(path))
    size = sum(os.path.getsize(f) for f in files)
    print(f"{len(files) * PART:,} rows in {len(files)} parts, {size / 1e9:.1f} GB", flush=True)
    few = max(options.pandas_rows // PART, 2)
    runs = [("ours", few), ("pandas", few // 2), ("pandas", few), ("pandas less", few)]
    runs += [("duckdb", len(files)), ("ours", len(files))]
    found = []
    for side, count in runs:
        found.append(measure(side, files[:count], options.folder / "out"))
        print(json.dumps(found[-1]), flush=True)
    rate = found[-1]["rows_per_core_s"]
    base = found[0]["rows_per_core_s"]
    for other in found[2:5]:
        print(f"ours / {other['side']}: {base / other['rows_per_core_s']:.2f}")
    print(f"{CORPUS:.3g} rows: {CORPUS / rate / 3600:.2f} core-hours")
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
