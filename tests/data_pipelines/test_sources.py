"""Random access to records."""

from __future__ import annotations

import concurrent.futures
import pickle

import pytest
from array_record.python import array_record_module

from data_pipelines.sources import Source
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.memory import MemorySource
from data_pipelines.sources.tfds import parse


@pytest.fixture
def files(tmp_path):
    out, number = [], 0
    for i, count in enumerate((5, 1, 30)):
        path = tmp_path / f"part-{i}"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(count):
            writer.write(f"record {number}".encode())
            number += 1
        writer.close()
        out.append((path, count))
    return out


def test_records_come_in_order(files):
    source = ArrayRecordSource(files)
    assert isinstance(source, Source) and len(source) == 36
    assert [source[i] for i in range(36)] == [f"record {i}".encode() for i in range(36)]
    for index in (-1, 36):
        with pytest.raises(IndexError, match="outside the 36 records"):
            source[index]
    source.close()
    assert source[3] == b"record 3"


def test_pickles_and_serves_threads(files):
    source = pickle.loads(pickle.dumps(ArrayRecordSource(files)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        out = list(pool.map(source.__getitem__, [i % 36 for i in range(400)]))
    assert out == [f"record {i % 36}".encode() for i in range(400)]


def test_missing_and_changed_files_are_named(files):
    path, count = files[1]
    with pytest.raises(ValueError, match="holds 1 records, but 2 were counted"):
        ArrayRecordSource([(path, count + 1)])[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="part-1 is missing; build the data set again"):
        ArrayRecordSource(files)[5]


def test_memory():
    source = MemorySource([b"a", b"b"])
    assert len(source) == 2 and source[1] == b"b" and isinstance(source, Source)


def test_records_that_are_not_ours():
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        parse(b"\xff\xff\xff", "image")
    with pytest.raises(ValueError, match="no field 'image'"):
        parse(b"", "image")
