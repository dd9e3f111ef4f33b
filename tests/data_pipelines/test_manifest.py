"""Manifests: what they say, what opening one costs, what damage comes to."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import re
from typing import NamedTuple

import numpy as np
import pytest

from data_pipelines import manifest as manifests
from data_pipelines.build.index import index
from data_pipelines.fields import FieldNames
from data_pipelines.sample import Caption
from data_pipelines.sources import BadShardError
from data_pipelines.sources.shards import locate
from tests.data_pipelines.shards import write_tar

FIELDS = FieldNames(image=("jpg",), caption=("txt",))


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i:05d}.tar", 4, 4 * i)
    index(str(tmp_path))
    return tmp_path


class Row(NamedTuple):
    """A `Shard` whose types are not checked half a million times."""

    path: str
    records: int
    bytes: int
    digest: bytes


def write_wide(folder, shards: int):
    rows = (Row(f"{i:06d}.tar", 10_000, 1000 + i, bytes(32)) for i in range(shards))
    folder.mkdir(exist_ok=True)
    manifests.write_manifest(str(folder), rows, kind="pairs", format="tar", fields=FIELDS)
    # Out of the page cache, or the kernel maps what is there in pieces of its own choice.
    with (folder / manifests.TABLE).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_set_by_record_number(folder):
    corpus = manifests.open_corpus(folder)
    assert (len(corpus), corpus.kind, corpus.ends.tolist()) == (12, "pairs", [4, 8, 12])
    assert corpus.source[9]["__key__"] == "000000009"
    sample = corpus.sample(9)
    assert sample.captions == (Caption("caption 9", "it"),) and sample.key == "000000009"
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.sample(11) == corpus.sample(11) and copy.digest == corpus.digest
    corpus.close()
    assert corpus.sample(9) == sample
    assert corpus.shards.shard(2).records == 4


def test_the_digest_is_of_the_content(folder, tmp_path_factory):
    digest = manifests.open_corpus(folder).digest
    elsewhere = tmp_path_factory.mktemp("out") / "indexes"
    index(str(folder), str(elsewhere))
    moved = manifests.open_corpus(elsewhere)
    assert moved.digest == digest and moved.sample(5).key == "000000005"
    write_tar(folder / "00002.tar", 4, 100)
    index(str(folder))
    assert manifests.open_corpus(folder).digest != digest


def mapped(path: pathlib.Path) -> int:
    """Bytes of a file that this process has touched through its map."""
    text = pathlib.Path("/proc/self/smaps").read_text()
    blocks = re.findall(rf"{re.escape(str(path))}\n(?:\w+:.*\n)*?Rss:\s+(\d+) kB", text)
    assert blocks, f"{path} is not mapped"
    return 1024 * sum(map(int, blocks))


def test_opening_touches_the_same_whatever_the_number_of_files(tmp_path):
    touched = {}
    for shards in (1000, 500_000):
        write_wide(tmp_path / str(shards), shards)
        corpus = manifests.open_corpus(tmp_path / str(shards))
        opened = mapped(tmp_path / str(shards) / manifests.TABLE)
        assert len(corpus) == 10_000 * shards
        for number in np.random.default_rng(0).integers(len(corpus), size=3).tolist():
            shard, position = locate(corpus.ends, number)
            assert 10_000 * shard + position == number
            assert corpus.shards.path(shard).endswith(f"{shard:06d}.tar")
        touched[shards] = (opened, mapped(tmp_path / str(shards) / manifests.TABLE))
    size = (tmp_path / "500000" / manifests.TABLE).stat().st_size
    assert size > 25 << 20
    # Linux maps up to 64 KiB around a page that is touched.
    assert touched[500_000][0] <= 256 << 10 and touched[500_000][1] < size / 5, touched


@pytest.mark.parametrize("shards", [1, 2, 1000, 100_000])
def test_the_first_and_last_records_of_files(shards):
    ends = np.cumsum(np.arange(1, shards + 1, dtype=np.int64) % 7 * 3000 + 1)
    for shard in {0, shards // 2, shards - 1}:
        start, end = int(ends[shard - 1]) if shard else 0, int(ends[shard])
        assert locate(ends, start) == (shard, 0)
        assert locate(ends, end - 1) == (shard, end - 1 - start)
    with pytest.raises(IndexError, match=f"outside the {ends[-1]} records"):
        locate(ends, int(ends[-1]))


def damage(folder, **changes):
    path = folder / manifests.MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "has version 2, this code reads 1; index the folder again"),
        ({"format": "zip"}, "names the format 'zip'"),
        ({"kind": "songs"}, "the kind 'songs'"),
        ({"fields": {"image": "jpg"}}, r"fields\.image is 'jpg', no list of names"),
        ({"fields": {"picture": ["jpg"]}}, "is damaged"),
        ({"novel": 1}, "is damaged"),
        ({"records": 11}, "has 3 files with 12 records, manifest.json 3 with 11"),
    ],
)
def test_damaged_manifests(folder, changes, message):
    damage(folder, **changes)
    with pytest.raises(ValueError, match=message):
        manifests.open_corpus(folder)


def test_missing_and_torn_files(folder):
    table = folder / manifests.TABLE
    data = table.read_bytes()
    for bad in (data[:-30], data[: len(data) // 2], b"", b"x" * len(data)):
        table.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"shards\.arrow is damaged .*; index the folder again"
        ):
            manifests.open_corpus(folder)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"shards\.arrow is missing; index the folder"):
        manifests.open_corpus(folder)
    (folder / manifests.MANIFEST).write_text("[")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        manifests.open_corpus(folder)
    (folder / manifests.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json; run python -m data_pip"):
        manifests.open_corpus(folder)


def test_a_replaced_tar_names_itself(folder):
    write_tar(folder / "00001.tar", 40)
    corpus = manifests.open_corpus(folder)
    assert corpus.sample(0) and corpus.sample(11)
    with pytest.raises(BadShardError, match=r"00001\.tar has changed since it was indexed"):
        corpus.sample(5)
