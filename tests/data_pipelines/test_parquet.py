"""Rows of parquet files."""

from __future__ import annotations

import concurrent.futures
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import BadShardError, Source
from data_pipelines.sources.parquet import ParquetSource
from tests.data_pipelines.shards import JPEG, write_parquet


def test_rows_come_in_order(tmp_path):
    pairs = [(write_parquet(tmp_path / f"{n}.parquet", n), n) for n in (5, 1, 10)]
    source = ParquetSource(pairs, open_files=1)
    assert isinstance(source, Source) and len(source) == 16
    wanted = [*range(5), 0, *range(10)]
    assert [source[i]["caption"] for i in range(16)] == [f"caption {n}" for n in wanted]
    assert source[15] == {
        "image": JPEG + b"9",
        "more": [b"x", b"y"],
        "caption": "caption 9",
        "score": 4.5,
        "about/lang": "it",
        "about/size/width": 9,
    }
    copy = pickle.loads(pickle.dumps(source))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: copy[i % 16]["caption"], range(200)))
    assert got == [f"caption {wanted[i % 16]}" for i in range(200)]
    source.close()


def test_groups_are_read_once_and_let_go(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 30, group=10)
    source = ParquetSource([(path, 30)])
    for i in (0, 9, 10, 5, 29):
        assert source[i]["score"] == i / 2
    assert sorted(source._groups._slots) == [(0, 0), (0, 1), (0, 2)]
    size = pq.ParquetFile(path).metadata.row_group(0).total_byte_size
    source = ParquetSource([(path, 30)], group_bytes=size + size // 2)
    for i in range(30):
        assert source[i]["score"] == i / 2
        assert source._groups._held <= size + size // 2
    assert len(source._groups) < 3
    with pytest.raises(BadShardError, match=r"Row group 0 of .*a\.parquet has \d+ bytes"):
        ParquetSource([(path, 30)], group_bytes=10)[0]


def test_files_that_do_not_fit(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", 5)
    with pytest.raises(BadShardError, match="holds 5 rows, but 6 were counted"):
        ParquetSource([(path, 6)])[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadShardError, match=r"a\.parquet cannot be read as parquet"):
        ParquetSource([(path, 5)])[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.parquet is missing"):
        ParquetSource([(path, 5)])[0]


def test_text_that_is_no_utf8(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes(4) + b"\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"caption": column}), path)
    with pytest.raises(BadRecordError) as caught:
        ParquetSource([(path, 1)])[0]
    assert caught.value.reason == "encoding"
