"""Local files and object stores, here fsspec's memory."""

from __future__ import annotations

import itertools
import pickle
import resource

import fsspec
import pytest

from data_pipelines.sources import storage
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.parquet import ParquetSource
from data_pipelines.sources.tar import TarSource


@pytest.fixture
def memory(monkeypatch):
    filesystem = fsspec.filesystem("memory")
    monkeypatch.setattr(storage, "WAIT", 0.001)
    yield filesystem
    if filesystem.exists("/bucket"):
        filesystem.rm("/bucket", recursive=True)


def test_the_same_calls_for_both(memory, tmp_path):
    for root in (str(tmp_path / "bucket"), "memory://bucket"):
        storage.write(storage.join(root, "a/b.tar"), b"0123456789")
        storage.write(storage.join(root, ".hidden/c"), b"")
        path = storage.join(root, "x/../a/b.tar")
        assert storage.read(path) == b"0123456789" and storage.stat(path)[0] == 10
        assert list(storage.walk(root)) == ["a/b.tar"]
        file = storage.RangedFile(path)
        assert (file.read(2, 5), file.read(8, 99), file.read(5, 5)) == (b"234", b"89", b"")
        file.close()
        assert storage.exists(path) and not storage.exists(path + "x")
        storage.remove(path)
        storage.remove(path)
        assert not storage.exists(path)
        with pytest.raises(FileNotFoundError):
            storage.read(path)


def test_more_files_may_be_open():
    """Eight parts of 128 open tars each are more than the usual 1,024."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        storage.allow_open_files(128)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
        storage.allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_lost_connection_is_tried_again(memory, monkeypatch):
    storage.write("memory://bucket/a", b"0123456789")
    calls, true = itertools.count(), type(memory).cat_file

    def flaky(self, *args, **kwargs):
        if next(calls) % storage.ATTEMPTS != storage.ATTEMPTS - 1:
            raise ConnectionError("reset")
        return true(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert storage.RangedFile("memory://bucket/a").read(2, 4) == b"23"
    assert next(calls) == storage.ATTEMPTS
    next(calls)
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    monkeypatch.setattr(type(memory), "cat_file", lambda *a, **k: 1 / 0)
    with pytest.raises(OSError, match=r"Reading memory://bucket/a failed 3 times.*division"):
        storage.read("memory://bucket/a")


def test_what_is_not_there_is_not_tried_again(memory, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(FileNotFoundError):
        storage.RangedFile("memory://bucket/none").read(0, 1)


def test_missing_packages_are_named(monkeypatch):
    def missing(scheme):
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    storage._filesystem.cache_clear()
    with pytest.raises(ImportError, match=r"gs:// needs a package: pip install gcsfs\."):
        storage.read("gs://bucket/a")
    storage._filesystem.cache_clear()


def put(memory, path, name):
    memory.pipe_file(f"/bucket/{name}", path.read_bytes())
    return f"memory://bucket/{name}"


def test_a_sample_is_one_ranged_read(memory, tmp_path, monkeypatch):
    from data_pipelines.sources import tar
    from tests.data_pipelines.shards import write_tar

    path = write_tar(tmp_path / "0.tar", 5)
    url = put(memory, path, "0.tar")
    index = tar.scan(url)
    assert index.pack()[24:] == tar.scan(str(path)).pack()[24:]
    storage.write(url + ".idx", index.pack())
    reads, true = [], type(memory).cat_file

    def count(self, path, start=None, end=None, **kwargs):
        reads.append((path, start, end))
        return true(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", count)
    source = pickle.loads(pickle.dumps(TarSource([(url, 5)])))
    for i in (3, 0, 4):
        assert source[i]["txt"] == f"caption {i}".encode()
    assert [path for path, _, _ in reads] == ["/bucket/0.tar.idx"] + ["/bucket/0.tar"] * 3
    assert all(end - start < 10_000 for _, start, end in reads[1:])


def test_array_record_is_fetched(memory, tmp_path, monkeypatch):
    from tests.data_pipelines.shards import write_array_record

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    pairs = [(put(memory, write_array_record(tmp_path / f"f{i}", 3), f"f{i}"), 3) for i in range(4)]
    before = set(tmp_path.iterdir())
    source = ArrayRecordSource(pairs, fetched_bytes=1)
    assert [source[i] for i in range(12)] == [b"record 0", b"record 1", b"record 2"] * 4
    assert set(tmp_path.iterdir()) == before and len(source._readers) == 1
    source.close()


def test_parquet_is_read_by_range(memory, tmp_path):
    from tests.data_pipelines.shards import write_parquet

    url = put(memory, write_parquet(tmp_path / "a.parquet", 10), "a.parquet")
    source = ParquetSource([(url, 10)])
    assert source[7]["caption"] == "caption 7" and source[7]["image"] == b"\xff\xd8\xff7"
    source.close()
