"""Duplicates against brute force, and the perceptual hash."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.clean import decontaminate, duplicates, semantic
from data_pipelines.clean.phash import phash
from data_pipelines.clean.steps import split

U64 = np.uint64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pictures(rng, count=400) -> np.ndarray:
    """Hashes of which half differ from others in up to four bits."""
    base = rng.integers(0, 2**64, count // 2, dtype=U64)
    other = base.copy()
    for _ in range(4):
        other ^= np.where(
            rng.random(len(base)) < 0.7,
            U64(1) << rng.integers(0, 64, len(base)).astype(U64),
            U64(0),
        )
    return np.concatenate([base, other, base[:20]])


def test_repeated_and_frequent(rng):
    keys = rng.integers(0, 300, 1000).astype(U64)
    positions = rng.permutation(5000)[:1000].astype(U64)
    first = {k: positions[keys == k].min() for k in np.unique(keys)}
    want = np.sort([p for k, p in zip(keys, positions) if p != first[k]])
    assert np.array_equal(duplicates.repeated(keys, positions), want)
    want = np.sort([p for k, p in zip(keys, positions) if np.sum(keys == k) > 4])
    assert 0 < len(want) < 1000
    assert np.array_equal(duplicates.frequent(keys, positions, 4), want)
    assert [*map(len, duplicates.firsts(keys, positions))] == [len(first)] * 2
    empty = np.empty(0, U64)
    assert not len(duplicates.repeated(empty, empty)) and not len(
        duplicates.frequent(empty, empty, 1)
    )


@pytest.mark.parametrize(("distance", "bands"), [(1, 4), (2, 4), (3, 4), (3, 6), (0, 4)])
def test_bands_find_all_pairs(rng, distance, bands):
    hashes = pictures(rng)
    positions = rng.permutation(len(hashes)).astype(U64)
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    want = np.sort(positions[(close & (positions < positions[:, None])).any(axis=1)])
    masks = duplicates.masks(distance, bands)
    found = [duplicates.near(hashes & U64(m), hashes, positions, distance) for m in masks]
    assert np.array_equal(np.unique(np.concatenate(found)), want)
    index = duplicates.NearIndex(hashes[:100], distance, bands)
    assert np.array_equal(index(hashes), close[:, :100].any(axis=1))


def test_split_loses_nothing(rng):
    keys = rng.integers(0, 2**40, 1000).astype(U64)
    parts = dict(split(keys, 7, np.arange(1000)))
    assert sorted(np.concatenate([rows for _, rows in parts.values()])) == list(range(1000))
    again = {n: {*k.tolist()} for n, (k, _) in split(keys[::-1], 7, keys[::-1])}
    assert again == {n: {*k.tolist()} for n, (k, _) in parts.items()}  # by the key alone


def test_phash(rng):
    from PIL import Image

    def picture(size):
        noise = rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)
        return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)

    image = picture((300, 200))
    known = phash(np.asarray(image))
    small = np.asarray(image.resize((150, 100), Image.Resampling.BICUBIC))
    assert (known ^ phash(small)).bit_count() <= 2
    assert (known ^ phash(np.asarray(picture((300, 200))))).bit_count() > 10
    flat = [phash(np.full((40, 40), value, np.uint8)) for value in (0, 255)]
    assert flat == [0, 1 << 63]
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    assert phash(ramp) == 0xAA << 56
    imagehash = pytest.importorskip("imagehash")
    for size in ((300, 200), (8, 8), (33, 500)):
        image = picture(size)
        assert f"{phash(np.asarray(image)):016x}" == str(imagehash.phash(image))


def test_semantic(rng, tmp_path, capsys):
    base = rng.normal(size=(60, 16))
    rows = np.concatenate([base, 3 * base[:25] + 0.01, base[:5]]).astype(np.float32)
    want = np.arange(90) >= 60
    assert np.array_equal(semantic.find_near(rows, 0.99, 4), want)
    uids = np.zeros(90, np.dtype("u8,u8"))
    uids["f0"] = np.arange(90)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "uids.npy", uids)
    paths = [f"--{n}={tmp_path}/{f}.npy" for n, f in (("embeddings", "rows"), ("out", "near"))]
    assert semantic.main([*paths, f"--uids={tmp_path}/uids.npy"]) == 0
    assert np.array_equal(np.load(tmp_path / "near.npy"), uids[want])
    assert semantic.main([*paths, f"--uids={tmp_path}/none.npy"]) == 78


def test_the_list_of_evaluation_sets(rng, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "sub").mkdir()
    pixels = rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sub" / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "c.json").write_text(
        '{"annotations": [{"id": 1, "caption": "one two three four"}]}'
    )
    (tmp_path / "c.txt").write_text("five six seven\n")
    arguments = ["--pictures", str(tmp_path), "--words", "3", "--least_words", "3"]
    captions = ["--captions", f"{tmp_path}/c.json", f"{tmp_path}/c.txt"]
    assert decontaminate.main([*arguments, *captions, "--out", f"{tmp_path}/x.npz"]) == 0
    listed = decontaminate.Listed.load(f"{tmp_path}/x.npz")
    assert listed.phashes.tolist() == [phash(pixels)]
    assert len(listed.runs) == 3 and (listed.words, listed.least_words) == (3, 3)
    assert "broken.jpg cannot be read" in capsys.readouterr().err
    (tmp_path / "sub" / "a.png").unlink()
    assert decontaminate.main([*arguments, "--out", f"{tmp_path}/y.npz"]) == 65
    assert decontaminate.main(["--pictures", f"{tmp_path}/none", "--out", "z"]) == 78
