"""`build convert`: tables with pictures, conversations and img2dataset output to ArrayRecord."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import build
from data_pipelines import manifest as manifests
from data_pipelines.build import convert as converting
from data_pipelines.build.tables import open_table, read_rows
from data_pipelines.sample import Turn
from tests.data_pipelines.shards import write_tar


def command(*arguments) -> int:
    return build.main([str(argument) for argument in arguments])


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (i % 256, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i in range(20):
        (folder / "sub" / f"{i}.png").write_bytes(png(i))
    return folder


def rows(count=20):
    return [
        {"file": f"sub/{i}.png", "caption": f'caffè, {i}\n"x"', "lang": "it", "id": i}
        for i in range(count)
    ]


def write_table(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_table(tmp_path, images, suffix):
    table = write_table(tmp_path / f"table{suffix}", rows())
    out = tmp_path / "out"
    done = command(
        *("convert", table, "--images", images, "--out", out),
        *("--records", 6, "--workers", 1 if suffix != ".csv" else 2),
    )
    assert done == 0
    corpus = manifests.open_corpus(out)
    assert corpus.ends.tolist() == [6, 12, 18, 20] and corpus.kind == "pairs"
    for i in range(20):
        sample = corpus.sample(i)
        assert (sample.key, sample.images) == (str(i), (png(i),))
        assert sample.captions[0].text == f'caffè, {i}\n"x"'.strip()
        assert sample.captions[0].language == "it"
    assert command("verify", out, "--workers", 1) == 0
    assert not list(out.rglob("*.tmp")) and (out / "skipped.jsonl").read_text() == ""


def test_bad_rows_are_counted_by_reason(tmp_path, images, capsys):
    (images / "page.jpg").write_bytes(b"<html>not found</html>")
    (images / "empty.jpg").write_bytes(b"")
    lines = ["image,text", "sub/0.png,good", "none.png,x", "sub/1.png,", "page.jpg,x"]
    lines += ["../table.csv,x", "sub/2.png,a,b", "sub/2.png", "empty.jpg,x", ",x"]
    table = tmp_path / "table.csv"
    table.write_bytes("\n".join(lines).encode() + b"\nsub/3.png,\xff\xfe\n")
    out = tmp_path / "out"
    arguments = ("convert", table, "--images", images, "--out", out, "--workers", 1)
    assert command(*arguments) == 65
    assert "9 of 10 records cannot be used" in capsys.readouterr().err
    assert command(*arguments, "--max_bad", 0.95) == 0
    corpus = manifests.open_corpus(out)
    assert len(corpus) == 1 and corpus.sample(0).captions[0].text == "good"
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(row["record"], row["reason"]) for row in skipped] == [
        (1, "missing image"),
        (2, "empty caption"),
        (3, "not a picture"),
        (4, "outside folder"),
        (5, "broken row"),
        (6, "broken row"),
        (7, "missing image"),
        (8, "missing image"),
        (9, "encoding"),
    ]
    assert skipped[2]["name"] == "page.jpg" and "<html>" in skipped[2]["why"]
    assert "has 3 cells, the header has 2" in skipped[4]["why"]


def test_missing_columns(tmp_path, images, capsys):
    table = write_table(tmp_path / "table.csv", rows())
    out = tmp_path / "out"
    assert command("convert", table, "--out", out, "--caption", "title") == 78
    said = capsys.readouterr().err
    assert f"{table} has no column 'title' for the caption; it has file, caption, lang, id" in said
    table = write_table(tmp_path / "table.jsonl", [{"file": "a.png", "words": "b"}])
    assert command("convert", table, "--out", out) == 78
    assert "no column for the caption; name it with --caption. It has file, words" in (
        capsys.readouterr().err
    )
    for name, content, message in (
        ("a.json", '{"a": [], "b": 1}', "holds an object of a, b; a list of objects is wanted"),
        ("b.json", "[1,", "is no JSON"),
        ("d.csv", "x" * (17 << 20), "d.csv holds no columns: field larger than field limit"),
        ("c.xlsx", "", r"is none of .csv, .tsv, .json, .jsonl, .parquet"),
    ):
        (tmp_path / name).write_text(content)
        assert command("convert", tmp_path / name, "--out", out) == 78
        assert message in capsys.readouterr().err
    assert command("convert", tmp_path / "none.csv", "--out", out) == 78
    assert not out.exists()


def test_buckets_are_not_written_to(tmp_path, images, monkeypatch, capsys):
    table = write_table(tmp_path / "table.csv", rows())
    monkeypatch.chdir(tmp_path)
    assert command("convert", table, "--images", images, "--out", "gs://bucket/mine") == 78
    assert "written to a local disk, and gs://bucket/mine is none" in capsys.readouterr().err
    assert not (tmp_path / "gs:").exists()


def test_one_language_for_all_and_named_columns(tmp_path, images, capsys):
    table = write_table(tmp_path / "table.tsv", [{"a": "sub/3.png", "b": "tre", "c": "k"}])
    out = tmp_path / "out"
    names = ("--image", "a", "--caption", "b", "--key", "c", "--language", "=it")
    assert command("convert", table, "--images", images, "--out", out, *names) == 0
    sample = manifests.open_corpus(out).sample(0)
    assert (sample.key, sample.captions[0].language, sample.images) == ("k", "it", (png(3),))
    assert command("convert", table, "--out", out, "--language", "=italian") == 78
    assert "--language =italian is none of =en, =zh," in capsys.readouterr().err


def test_conversations(tmp_path, images):
    turns = [{"from": "human", "value": "<image>\nWas?"}, {"from": "gpt", "value": "Ein Bär."}]
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    two = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No."}]
    table = write_table(
        tmp_path / "llava.json",
        [
            {"id": "a/1", "image": "sub/1.png", "conversations": turns},
            {"id": "2", "conversations": text},
            {"id": 3, "image": ["sub/3.png", "sub/4.png"], "conversations": two},
            {"id": 4, "image": "sub/4.png", "conversations": two},
        ],
    )
    out = tmp_path / "out"
    assert command("convert", table, "--images", images, "--out", out, "--max_bad", 0.3) == 0
    corpus = manifests.open_corpus(out)
    assert (corpus.kind, len(corpus)) == ("conversations", 3)
    first, second, third = (corpus.sample(i) for i in range(3))
    assert first.turns == (Turn("human", "<image>\nWas?"), Turn("gpt", "Ein Bär."))
    assert (first.key, first.images) == ("a/1", (png(1),))
    assert (second.key, second.images) == ("2", ())
    assert third.images == (png(3), png(4))
    assert json.loads((out / "skipped.jsonl").read_text())["reason"] == "image count"


def test_img2dataset_to_array_record_with_validation(tmp_path):
    for i in range(4):
        write_tar(tmp_path / f"{i:05d}.tar", 50, 50 * i)
    out = tmp_path / "out"
    assert command("convert", tmp_path, "--out", out) == 78  # not indexed yet
    assert command("index", tmp_path, "--workers", 1) == 0
    split = ("--validation", 0.2, "--records", 70, "--workers", 2)
    assert command("convert", tmp_path, "--out", out, *split) == 0
    train, held_out = manifests.open_corpus(out), manifests.open_corpus(out / "validation")
    keys = [{c.sample(i).key for i in range(len(c))} for c in (train, held_out)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 200
    assert 20 <= len(held_out) <= 60
    assert keys[1] == {k for k in keys[0] | keys[1] if converting.is_held_out(k, 0.2)}
    source = manifests.open_corpus(tmp_path)
    wanted = {s.key: (s.images, s.captions, s.group) for s in map(source.sample, range(200))}
    for corpus in (train, held_out):
        for i in range(len(corpus)):
            s = corpus.sample(i)
            assert (s.images, s.captions, s.group) == wanted[s.key]
    # A validation set in the folder is no part of the set that the folder is.
    assert command("index", out, "--workers", 1) == 0
    assert len(manifests.open_corpus(out)) == len(train)
    assert manifests.open_corpus(out).shards.shard(0).digest == train.shards.shard(0).digest


def test_going_on_after_a_kill(tmp_path, images):
    """The process is killed while it works; what it wrote is kept, and the end is the same."""
    table = write_table(tmp_path / "table.jsonl", rows() * 60)
    arguments = ["convert", str(table), "--images", str(images), "--records", "20"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command(*arguments, "--out", whole, "--workers", 1) == 0
    slow = (
        "import sys, time\n"
        "from data_pipelines import build\n"
        "from data_pipelines.build import convert\n"
        "write = convert.write_chunk\n"
        "def slowly(job):\n"
        "    time.sleep(0.02)\n"
        "    return write(job)\n"
        "convert.write_chunk = slowly\n"
        "sys.exit(build.main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments, "--out", str(out), "--workers", "1"]
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.array_record"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    assert 5 <= len(kept) < 60 and not (out / "manifest.json").exists()
    # The last of them may not have reached the journal; it is written again.
    assert command(*arguments, "--out", out, "--workers", 1) == 0
    again = [path for path, changed in kept.items() if path.stat().st_mtime_ns != changed]
    assert len(again) <= 1
    assert manifests.open_corpus(out).digest == manifests.open_corpus(whole).digest
    for path in whole.glob("*.array_record"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_other_settings_do_not_mix(tmp_path, images, monkeypatch, capsys):
    table = write_table(tmp_path / "table.csv", rows())
    arguments = ("convert", table, "--images", images, "--out", tmp_path / "out", "--workers", 1)
    calls, true = [], converting.write_chunk

    def interrupted(job):
        if calls:
            raise KeyboardInterrupt
        calls.append(job)
        return true(job)

    monkeypatch.setattr(converting, "write_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(*arguments, "--records", 6)
    assert len(calls) == 1
    assert command(*arguments, "--records", 7) == 78
    assert "was begun with another records; delete" in capsys.readouterr().err


def test_a_second_run_writes_only_what_is_gone(tmp_path, images, monkeypatch, capsys):
    table = write_table(tmp_path / "table.csv", rows())
    out = tmp_path / "out"
    arguments = ("convert", table, "--images", images, "--out", out, "--workers", 1)
    assert command(*arguments, "--records", 6) == 0
    digest = manifests.open_corpus(out).digest
    (out / "part-000002.array_record").unlink()
    (out / "part-000001.array_record").write_bytes(b"torn")
    numbers, true = [], converting.write_chunk
    monkeypatch.setattr(
        converting, "write_chunk", lambda job: numbers.append(job.number) or true(job)
    )
    assert command(*arguments, "--records", 6) == 0
    assert numbers == [1, 2] and manifests.open_corpus(out).digest == digest
    assert command(*arguments, "--records", 7) == 78
    assert "was begun with another records; delete" in capsys.readouterr().err
    assert manifests.open_corpus(out).digest == digest


def test_shares_grow_and_parquet_may_hold_the_pictures(tmp_path):
    table = tmp_path / "t.parquet"
    write_table(
        table, [{"image": {"bytes": png(i), "path": None}, "text": f"{i}"} for i in range(9)]
    )
    shares = [share for share, _ in read_rows(str(table))]
    assert shares == sorted(shares) and shares[-1] == 1
    opened = open_table(str(table), "", {})
    chunks = list(opened.chunks(4))
    assert [len(chunk) for _, chunk in chunks] == [4, 4, 1]
    (number, name, sample), *_ = opened.samples(chunks[1][1])
    assert (number, name, sample.key, sample.images) == (4, "", "4", (png(4),))
