"""Samples of tars, byte for byte what tarfile reads, and what hostile ones come to."""

from __future__ import annotations

import concurrent.futures
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from data_pipelines.sample import BadRecordError
from data_pipelines.sources import BadShardError, Source, tar

LONG = "a-folder-with-a-long-name/" * 6
"""More than the 100 and less than the 255 bytes that ustar has room for."""


def write_tar(path, files, format=tarfile.GNU_FORMAT):
    """files: (name, bytes) or a ready TarInfo."""
    with tarfile.open(path, "w", format=format) as archive:
        for entry in files:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            name, data = entry
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def open_tar(path) -> tar.TarSource:
    index = tar.scan(str(path))
    path.with_name(path.name + ".idx").write_bytes(index.pack())
    return tar.TarSource([(path, len(index))])


def expected(path):
    """What tarfile and webdataset's rule make of an archive."""
    samples = []
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isreg():
                continue
            folder, _, file = member.name.rpartition("/")
            stem, dot, extension = file.partition(".")
            if not stem or not dot:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            samples[-1][extension.lower()] = archive.extractfile(member).read()
    return samples


def pictures(prefix: str, count: int = 5):
    """Samples of odd sizes, the multiples of a block and nothing at all among them."""
    sizes = (0, 1, 511, 512, 513, 1024, 70_001)
    files = []
    for i in range(count):
        files += [
            (f"{prefix}{i:05d}.jpg", bytes([i % 251]) * sizes[i % len(sizes)]),
            (f"{prefix}{i:05d}.txt", f"caption {i}".encode()),
            (f"{prefix}{i:05d}.JSON", b"{}"),
        ]
    return files


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prefix", ["", "part/", LONG, "été/図-", "deep/" * 30])
def test_every_kind_of_name(tmp_path, format, prefix):
    if format == "ustar" and prefix == LONG:
        prefix = prefix.rstrip("/") + "/"
    path = write_tar(tmp_path / "0.tar", pictures(prefix, 9), FORMATS[format])
    source = open_tar(path)
    assert isinstance(source, Source) and len(source) == 9
    assert [source[i] for i in range(9)] == expected(path)
    assert source[6]["jpg"] == b"\x06" * 70_001


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_names_beyond_what_ustar_holds(tmp_path, format):
    path = write_tar(tmp_path / "0.tar", pictures("x" * 300 + "/" + "y" * 200), FORMATS[format])
    source = open_tar(path)
    assert [source[i] for i in range(5)] == expected(path) and len(source) == 5


def test_folders_links_and_strangers_between_samples(tmp_path):
    folder, link, hard = (tarfile.TarInfo(name) for name in ("d", "link.jpg", "hard.jpg"))
    folder.type, link.type, hard.type = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    link.linkname = hard.linkname = "d/1.jpg"
    files = [folder, ("__meta.json__", b"no sample"), ("d/1.jpg", b"one"), link, ("d/1.txt", b"1")]
    files += [("README", b"no dot"), ("d/.hidden", b"no stem"), hard, folder]
    files += [("d/2.a.b.JPG", b"two"), ("d.e/2.jpg", b"three"), ("d/1.jpg", b"one again")]
    path = write_tar(tmp_path / "0.tar", files, tarfile.PAX_FORMAT)
    source = open_tar(path)
    assert [source[i] for i in range(len(source))] == [
        {"jpg": b"one", "txt": b"1", "__key__": "d/1"},
        {"a.b.jpg": b"two", "__key__": "d/2"},
        {"jpg": b"three", "__key__": "d.e/2"},
        {"jpg": b"one again", "__key__": "d/1"},
    ]


def test_base_256_and_pax_sizes(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("1.jpg", b"x" * 700), ("2.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    path.write_bytes(data)
    assert [s["jpg"] for s in map(open_tar(path).__getitem__, range(2))] == [b"x" * 700, b"y"]

    # A PAX size rules over the header's.
    info = tarfile.TarInfo("3.jpg")
    info.size = 600
    info.pax_headers = {"size": "600", "path": "renamed/4.PNG"}
    pax = tmp_path / "pax.tar"
    with tarfile.open(pax, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"z" * 600))
    data = bytearray(pax.read_bytes())
    at = 1024  # the file's own header, after the PAX header and its block
    assert data[at : at + 5] == b"3.jpg" or data[at : at + 7] == b"renamed"
    data[at + 124 : at + 136] = b"00000000000\0"
    head = data[at : at + 512]
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    pax.write_bytes(data)
    assert open_tar(pax)[0] == expected(pax)[0] == {"png": b"z" * 600, "__key__": "renamed/4"}


@pytest.mark.parametrize("cut", [700, 100, 512 + 60, 71_000])
def test_a_tar_that_is_cut_off(tmp_path, cut):
    path = write_tar(tmp_path / "0.tar", pictures("", 9))
    with path.open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 10240 * 10240 - 10240 * 1 - cut)
    with pytest.raises(BadShardError, match=r"0\.tar is cut off.*fetch it again"):
        tar.scan(str(path))


@pytest.mark.parametrize(
    "field, value",
    [
        ((124, 136), b"\x80" + b"\xff" * 11),  # a size beyond any disk
        ((124, 136), b"\xff" * 12),  # a negative one
        ((124, 136), b"-0000000001\0"),
        ((124, 136), b"99999999999\0"),
        ((0, 4), b"oops"),  # a wrong checksum
    ],
)
def test_headers_that_lie(tmp_path, field, value):
    path = write_tar(tmp_path / "0.tar", [("1.jpg", b"x"), ("2.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[slice(*field)] = value
    if field[0]:
        data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    path.write_bytes(data)
    with pytest.raises(BadShardError, match=r"0\.tar (has a broken number|has no tar|is cut off)"):
        tar.scan(str(path))


def header(name: bytes, kind: bytes, size: int) -> bytes:
    head = bytearray(512)
    head[: len(name)], head[156:157] = name, kind
    head[124:136] = b"\x80" + size.to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (sum(head) + 256)
    return bytes(head)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"not a tar at all" * 100, "broken number in the header at byte 0"),
        (header(b"x", b"L", 2 << 20) + bytes(3 << 20), "a name of 2097152 bytes"),
        (header(b"x", b"x", 20) + b"99 path=a".ljust(1024, b"\0"), "broken PAX header"),
        (header(b"x", b"x", 20) + b"20 size=-000000000\n".ljust(1024, b"\0"), "broken"),
        (header(b"x", b"S", 0) + bytes(1024), "sparse member"),
        (header(b"x.txt", b"0", 3) + b"abc".ljust(512, b"\0"), "end mark is missing"),
        (b"", "end mark is missing"),
    ],
)
def test_hostile_tars(tmp_path, data, message):
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    with pytest.raises(BadShardError, match=message):
        tar.scan(str(path))


def test_names_are_only_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_tar(
        write_tar(tmp_path / "0.tar", [("../../etc/x.jpg", b"1"), ("/etc/y.jpg", b"2")])
    )
    assert [source[i]["__key__"] for i in range(2)] == ["../../etc/x", "/etc/y"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar", "0.tar.idx"]


def test_samples_that_cannot_be_used(tmp_path, monkeypatch):
    files = [("1.jpg", b"x"), ("1.JPG", b"y"), ("2.jpg", b"z" * 5000), ("3.jpg", b"w")]
    source = open_tar(write_tar(tmp_path / "0.tar", files))
    monkeypatch.setattr(tar, "MAX_SAMPLE", 4096)
    for number, reason in enumerate(("two members", "too large")):
        with pytest.raises(BadRecordError) as caught:
            source[number]
        assert caught.value.reason == reason
    assert source[2]["jpg"] == b"w"


def test_a_changed_tar_is_noticed(tmp_path):
    path = write_tar(tmp_path / "0.tar", pictures(""))
    source = open_tar(path)
    assert source[0]
    source.close()
    write_tar(path, pictures("", 40))
    with pytest.raises(BadShardError, match="has changed since it was indexed; index the folder"):
        source[0]
    # The same size, other places: the headers tell.
    path = write_tar(tmp_path / "1.tar", [("1.jpg", b"x" * 2000), ("2.jpg", b"y" * 100)])
    source = open_tar(path)
    write_tar(path, [("1.jpg", b"x" * 100), ("2.jpg", b"y" * 2000)])
    with pytest.raises(BadShardError, match=r"1\.tar has changed"):
        [source[i] for i in range(2)]


def test_an_index_that_is_missing_or_broken(tmp_path):
    path = write_tar(tmp_path / "0.tar", pictures(""))
    open_tar(path)
    index = tmp_path / "0.tar.idx"
    good = index.read_bytes()
    for bad in (good[:-4], good[:10], b"x" + good[1:], good[:-4] + bytes(4)):
        index.write_bytes(bad)
        with pytest.raises(BadShardError, match="no index of a tar or a broken one"):
            tar.TarSource([(path, 5)])[0]
    index.write_bytes(good)
    with pytest.raises(BadShardError, match="has 5 samples, the manifest 6"):
        tar.TarSource([(path, 6)])[0]
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.tar\.idx is missing; run python -m"):
        tar.TarSource([(path, 5)])[0]
    index.write_bytes(good)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"The tar .*0\.tar is missing"):
        tar.TarSource([(path, 5)])[0]


def test_random_names_against_tarfile(tmp_path):
    rng = np.random.default_rng(0)
    letters = list("abcXYZ0189._-/ éß図😀")
    for trial in range(60):
        files = []
        for _ in range(int(rng.integers(1, 12))):
            name = "".join(rng.choice(letters, int(rng.integers(1, 180)))).strip("/ ")
            if name and not name.endswith("/") and name not in dict(files):
                files.append((name, rng.bytes(int(rng.integers(0, 2000)))))
        path = write_tar(tmp_path / f"{trial}.tar", files, [*FORMATS.values()][1 + trial % 2])
        source, wanted = open_tar(path), expected(path)
        assert len(source) == len(wanted)
        for number, sample in enumerate(wanted):
            try:
                assert source[number] == sample
            except BadRecordError as error:
                assert error.reason == "two members"  # differ in the case of their letters


def test_damage_anywhere_is_named(tmp_path):
    """Whatever a byte becomes, reading ends with a sample or with one of our errors."""
    path = write_tar(tmp_path / "0.tar", pictures("x" * 90 + "/é/", 4), tarfile.PAX_FORMAT)
    good, index = path.read_bytes(), tar.scan(str(path)).pack()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(600):
        data = bytearray(good)
        for place in rng.integers(0, 8 * 1024, int(rng.integers(1, 4))).tolist():
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            path.with_name("0.tar.idx").write_bytes(index if rng.random() < 0.5 else b"")
            source = tar.TarSource([(path, 4)]) if rng.random() < 0.5 else open_tar(path)
            for i in range(len(source)):
                assert "__key__" in source[i]
        except BadRecordError:
            refused += 1
        source.close()
    assert 100 < refused < 600


def test_pickles_serves_threads_and_bounds_descriptors(tmp_path):
    first = write_tar(tmp_path / "0.tar", pictures("", 3))
    index, data = tar.scan(str(first)).pack(), first.read_bytes()
    paths = [tmp_path / f"{i:04d}.tar" for i in range(2000)]
    for path in paths:
        path.write_bytes(data)
        path.with_name(path.name + ".idx").write_bytes(index)
    source = tar.TarSource([(path, 3) for path in paths], open_files=20)
    source = pickle.loads(pickle.dumps(source))
    before, wanted, most = len(os.listdir("/proc/self/fd")), expected(first), 0

    def read(number: int) -> int:
        nonlocal most
        assert source[number] == wanted[number % 3]
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        return 1

    numbers = np.random.default_rng(0).permutation(6000)[:4000].tolist()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(read, numbers)) == 4000
    # 20 files, one more in each thread's hands, and the threads' looking itself.
    assert 20 <= most <= 20 + 4 + 4 + 4
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert source[5999] == wanted[2]
