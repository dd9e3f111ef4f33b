"""Random access to records."""

from __future__ import annotations

import concurrent.futures
import os
import pickle

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import BadShardError, Source
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.memory import MemorySource
from data_pipelines.sources.tfds import ExampleSource, parse, serialize


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


def test_open_files_are_bounded(files):
    before = len(os.listdir("/proc/self/fd"))
    source = ArrayRecordSource(files * 50, open_files=4)
    numbers = np.random.default_rng(0).permutation(len(source)).tolist()
    assert len(source) == 1800
    for i in numbers:
        assert source[i] == f"record {i % 36}".encode()
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_broken_files_and_records(files, tmp_path):
    path = tmp_path / "long"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(20):
        writer.write(bytes([i]) * 10_000)
    writer.close()
    data = bytearray(path.read_bytes())
    data[105_000:105_100] = bytes(100)
    path.write_bytes(data)
    reasons = []
    for i in range(20):
        try:
            assert ArrayRecordSource([(path, 20)])[i] == bytes([i]) * 10_000
        except BadRecordError as error:
            reasons.append(error.reason)
    assert reasons == ["broken"]
    for torn in (b"", b"x" * 70_000, bytes(data[:150_000])):
        path.write_bytes(torn)
        with pytest.raises(BadShardError, match="long cannot be read as ArrayRecord"):
            ArrayRecordSource([(path, 20)])[0]


def test_fields_of_examples():
    record = serialize({"image": [b"a", b"b"], "caption": ["é".encode()], "language": []})
    source = ExampleSource(MemorySource([record, b"\xff\xff"]))
    assert source[0] == {"image": [b"a", b"b"], "caption": "é".encode(), "language": None}
    with pytest.raises(BadRecordError, match=r"no tf\.train\.Example"):
        source[1]


def test_bad_shards_travel_between_processes():
    error = pickle.loads(pickle.dumps(BadShardError("a sentence.")))
    assert (error.reason, str(error)) == ("shard", "a sentence.")


def test_memory():
    source = MemorySource([b"a", b"b"])
    assert len(source) == 2 and source[1] == b"b" and isinstance(source, Source)


def test_records_that_are_not_ours():
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        parse(b"\xff\xff\xff", "image")
    with pytest.raises(ValueError, match="no field 'image'"):
        parse(b"", "image")
