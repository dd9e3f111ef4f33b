"""A small corpus of five sources through both drivers, interrupted and not."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.clean import local
from data_pipelines.clean.config import (
    Captions,
    CleanConfig,
    ConfigError,
    Duplicates,
    Signals,
    Source,
)  # fmt: skip
from data_pipelines.clean.report import make_report
from data_pipelines.metadata.keys import normalise_url
from data_pipelines.metadata.read import read

ROOT = pathlib.Path(__file__).parents[3]
COUNT = 300


def write_corpus(root: pathlib.Path) -> dict[str, str]:
    r = random.Random(0)
    words = [
        "brown",
        "dog",
        "beach",
        "黑色",
        "猫",
        "قطة",
        "old",
        "кошка",
        "click",
        "here",
        "IMG_1.jpg",
    ]
    hashes = [r.getrandbits(64) for _ in range(40)]

    def url() -> str:
        site = f"http{r.choice(['', 's'])}://{r.choice(['www.', ''])}Host{r.randint(0, 3)}.com"
        return f"{site}/{r.randint(0, 2 * COUNT)}.jpg{r.choice(['', '#x', '/'])}"

    caption = lambda: " ".join(r.choices(words, k=r.randint(0, 6)))
    maybe = lambda value: None if r.random() < 0.2 else value
    urls = lambda: [url() for _ in range(COUNT)]
    captions = lambda: [caption() for _ in range(COUNT)]
    (root / "sbu.json").write_text(json.dumps(dict(image_urls=urls(), captions=captions())))
    lines = [
        f"{u}\t{c}\n" if i % 97 else "broken\n" for i, (u, c) in enumerate(zip(urls(), captions()))
    ]
    (root / "cc12m.tsv").write_text("".join(lines))
    lines = [f'{u},"{c}"\n' for u, c in zip(urls(), captions())]
    (root / "wukong.csv").write_text("url,caption\n" + "".join(lines))
    pictures = [f"{r.choice(hashes) ^ 1 << r.randint(0, 63):016x}" for _ in range(COUNT)]
    pq.write_table(
        pa.table(dict(url=urls(), text=captions(), image_phash=pictures)), root / "coyo.parquet"
    )
    for part in range(3):
        scores = [maybe(r.uniform(0.2, 0.4)) for _ in range(COUNT)]
        table = pa.table(dict(URL=[maybe(u) for u in urls()], TEXT=captions(), similarity=scores))
        pq.write_table(table, root / f"laion_en-{part}.parquet", row_group_size=100)
    files = dict(sbu="sbu.json", cc12m="cc12m.tsv", wukong="wukong.csv", coyo="coyo.parquet")
    return {
        **{n: str(root / f) for n, f in files.items()},
        "laion_en": f"{root}/laion_en-*.parquet",
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def settings(files, output, **more) -> CleanConfig:
    defaults = dict(
        stage=2,
        output=str(output),
        order=tuple(files),
        sources={name: Source((pattern,)) for name, pattern in files.items()},
        signals=Signals(similarity=0.25),
        captions=Captions(least=3, placeholders=True, boilerplate=True),
        duplicates=Duplicates(keys=("url", "phash"), distance=2, caption_count=20, partitions=5),
    )
    return CleanConfig(**{**defaults, **more})


def contents(folder: pathlib.Path) -> dict[str, object]:
    """What was written: tables and lists by value, all else byte by byte."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        value = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else path.read_bytes()
        found[str(path.relative_to(folder))] = value
    return found


@pytest.fixture(scope="module")
def cleaned(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cleaned")
    config = settings(files, folder)
    report = make_report(config, local.run(config, report=lambda line: None))
    return folder, report


def test_every_row_is_accounted_for(cleaned):
    folder, report = cleaned
    for name, entry in report["sources"].items():
        assert entry["rows"] == entry["kept"] + sum(entry["dropped"].values()), name
    whole = report["sources"]["all"]
    assert whole["rows"] == 7 * COUNT and 0 < whole["kept"] < whole["rows"]
    assert report["sources"]["cc12m"]["dropped"]["malformed"] == 4
    wanted = {
        "no_url",
        "no_caption",
        "similarity",
        "placeholder",
        "duplicate_url",
        "caption_repeated",
    }
    assert wanted | {"duplicate_phash", "near_phash"} <= whole["dropped"].keys()
    tables = [pq.read_table(p) for p in sorted((folder / "kept").glob("*.parquet"))]
    assert sum(t.num_rows for t in tables) == whole["kept"]
    uids = np.concatenate([np.load(p) for p in sorted((folder / "uids").glob("*.npy"))])
    kept = b"".join(uid for t in tables for uid in t["uid"].to_pylist())
    assert uids.view("u8").astype(">u8").tobytes() == kept


def test_the_first_of_the_order_stays(files, cleaned):
    folder, _ = cleaned
    config = settings(files, "x", captions=Captions(), signals=Signals())
    seen, first = set(), {}
    for name in config.order:
        for path in sorted(pathlib.Path(files[name]).parent.glob(pathlib.Path(files[name]).name)):
            for batch in read(str(path), name, ["url"]):
                for url in filter(None, batch.column("url").to_pylist()):
                    first.setdefault(normalise_url(url), name)
    for path in sorted((folder / "kept").glob("*.parquet")):
        for row in pq.read_table(path, columns=["url", "source"]).to_pylist():
            key = normalise_url(row["url"])
            assert key not in seen
            seen.add(key)
    assert len(seen) > COUNT and len({first[k] for k in seen}) > 1


def test_duplicates_alone_keep_one_row_of_every_url(files, tmp_path):
    config = settings(
        files,
        tmp_path / "out",
        signals=Signals(),
        captions=Captions(),
        duplicates=Duplicates(partitions=3),
    )
    folder = local.run(config, report=lambda line: None)
    want, rows = {}, 0
    for name, pattern in files.items():
        base = pathlib.Path(pattern)
        for path in sorted(base.parent.glob(base.name)):
            for batch in read(str(path), name, ["url", "caption"]):
                for row in batch.to_pylist():
                    rows += 1
                    if row["url"] and row["caption"]:
                        want.setdefault(
                            normalise_url(row["url"]), (name, row["url"], row["caption"])
                        )
    found = [
        (row["source"], row["url"], row["caption"])
        for path in sorted((tmp_path / "out" / "kept").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert found and sorted(found) == sorted(want.values())
    assert make_report(config, folder)["sources"]["all"]["rows"] == rows + 4  # the broken lines


def test_workers_and_partitions_change_nothing(files, cleaned, tmp_path):
    more = dict(
        duplicates=Duplicates(
            keys=("url", "phash"), distance=2, bands=5, caption_count=20, partitions=2
        )
    )
    config = settings(files, tmp_path, workers=2, **more)
    make_report(config, local.run(config, report=lambda line: None))
    assert contents(tmp_path) == contents(cleaned[0])


KILLED = """
import os, sys
from data_pipelines.clean import local
from tests.data_pipelines.clean import test_drivers as t
step, output, files = sys.argv[1], sys.argv[2], eval(sys.argv[3])
original, calls = getattr(local, step), []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os._exit(137)
    original(*arguments)
setattr(local, step, counted)
local.run(t.settings(files, output), report=lambda line: None)
"""


@pytest.mark.parametrize("step", ["scan_part", "resolve_partition", "resolve_near", "write_part"])
def test_goes_on_where_it_was_killed(files, cleaned, tmp_path, step, monkeypatch):
    arguments = [sys.executable, "-c", KILLED, step, str(tmp_path), repr(files)]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == 137
    done = []
    original = getattr(local, step)
    monkeypatch.setattr(local, step, lambda *a: (done.append(a), original(*a)))
    total = {"scan_part": 7, "resolve_partition": 15, "resolve_near": 5, "write_part": 7}[step]
    config = settings(files, tmp_path)
    make_report(config, local.run(config, report=lambda line: None))
    assert len(done) == total - 2
    assert contents(tmp_path) == contents(cleaned[0])
    local.run(config, report=lambda line: None)
    assert len(done) == total - 2  # nothing is done twice


def test_captions_of_some_sources_are_counted(files, tmp_path):
    counted = Duplicates(keys=("caption",), captions_of=("coyo", "laion_en"), partitions=2)
    config = settings(files, tmp_path, signals=Signals(), duplicates=counted)
    sources = make_report(config, local.run(config, report=lambda line: None))["sources"]
    found = {name: entry["dropped"].get("duplicate_caption", 0) for name, entry in sources.items()}
    assert found["sbu"] == found["cc12m"] == found["wukong"] == 0
    assert found["coyo"] > 0 and found["laion_en"] > 0


def test_other_settings_and_files_do_not_mix(files, cleaned):
    with pytest.raises(ConfigError, match="was begun with other settings"):
        local.run(settings(files, cleaned[0], signals=Signals()))
    fewer = {**files, "laion_en": files["laion_en"].replace("*", "0")}
    with pytest.raises(ConfigError, match="was begun with other inputs"):
        local.run(settings(fewer, cleaned[0]))
    with pytest.raises(ConfigError, match="No file matches nowhere"):
        local.run(settings({"sbu": "nowhere/*.json"}, cleaned[0]))


def test_beam_writes_the_same(files, cleaned, tmp_path):
    pytest.importorskip("apache_beam")
    from data_pipelines.clean import beam

    config = settings(files, tmp_path, driver="beam")
    make_report(config, beam.run(config, options=["--runner=DirectRunner"]))
    assert contents(tmp_path) == contents(cleaned[0])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "data_pipelines.clean", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command(files, tmp_path):
    chosen = [f"--config.sources.{name}.files={files[name]}" for name in ("sbu", "cc12m")]
    common = [*chosen, "--config.order=('sbu', 'cc12m')", f"--config.output={tmp_path}/out"]
    done = command("--config=configs/clean_stage2.py", *common, "--config.malformed=0.001")
    assert done.returncode == 65 and "4 of 600 lines could not be parsed" in done.stderr
    done = command("--config=configs/clean_stage2.py", *common)
    assert done.returncode == 0 and "sbu" in done.stdout, done.stderr
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "placeholder" not in page and "no caption" in page
    for arguments, message in [
        (["--config.duplicats.distance=1"], 'did you mean "duplicates"'),
        (
            ["--config.signals.similarty=1"],
            """no setting 'similarty'. did you mean "similarity" """.strip(),
        ),
        (["--config.stage=3"], "config.stage is 3: use 1 or 2."),
        (["--config.order=('coyo',)"], "No file matches data/metadata/coyo"),
        (["extra"], "Unexpected argument 'extra'"),
    ]:
        refused = command("--config=configs/clean_stage1.py", *arguments)
        assert refused.returncode == 78 and len(refused.stderr.splitlines()) == 1, refused.stderr
        assert message.lower() in refused.stderr.lower()
    assert command("--config=none.py").returncode == 78
