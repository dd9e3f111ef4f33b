"""Keys against their definition in plain Python."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from data_pipelines.metadata import keys

ALL = 2**64 - 1


def finish(x: int) -> int:
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x ^= x >> 33
        x = x * factor & ALL
    return x ^ x >> 33


def plain_hash(text: str, seed: int = 0) -> int:
    data, total = text.encode(), 0
    for i in range(0, len(data), 8):
        word = int.from_bytes(data[i : i + 8], "little")
        salt = (seed * 0x632BE59BD9B4E019 + 1) & ALL
        total += finish((word + i // 8 * 0x9E3779B97F4A7C15 + salt) & ALL)
    return finish((total + len(data) * 0x9E3779B97F4A7C15) & ALL)


def texts(count: int, longest: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choices("abXYZ09é猫/:#.?&% ", k=rng.randint(0, longest))) for _ in range(count)
    ]


@pytest.mark.parametrize("seed", [0, 3])
def test_hash(seed):
    given = [*texts(500, 60), None, "x" * 300_000]
    found = keys.hash_strings(pa.array(given).slice(5), seed)
    assert found.tolist() == [plain_hash(t or "", seed) for t in given[5:]]


@pytest.mark.parametrize(
    "same",
    [
        ("http://a.com/X.jpg", "https://www.a.com/X.jpg", "//A.com/X.jpg#top", " HTTP://WWW.a.com:80/X.jpg/"),
        ("http://a.com", "https://a.com/", "a.com"),
        ("http://a.com/x?b=C/d", "http://a.com:443/x?b=C/d#e"),
    ],
)  # fmt: skip
def test_urls_that_are_one(same):
    assert len({keys.normalise_url(url) for url in same}) == 1
    assert len({*keys.url_keys(pa.array(same)).tolist()}) == 1


def test_urls_that_are_not_one():
    urls = [
        "http://a.com/x",
        "http://a.com/X",
        "http://a.com:8080/x",
        "http://a.com/x?y",
        "b.com/x",
    ]
    assert len({*keys.url_keys(pa.array(urls)).tolist()}) == len(urls)


def test_the_fast_way_is_the_slow_way():
    rng = random.Random(1)
    urls = [
        rng.choice(["http://", "https://", "HTTP://", "//", "", " http://", "ftp://"])
        + rng.choice(["www.", "WWW.", ""])
        + rng.choice(["a.com", "A.com", "a.com:80", "a.com:8080"])
        + rng.choice(["", "/", "?x", "#f"])
        + tail
        + rng.choice(["", "/", " "])
        for tail in texts(2000, 20)
    ]
    want = [plain_hash(keys.normalise_url(url)) for url in urls[3:]]
    assert keys.url_keys(pa.array(urls).slice(3)).tolist() == want


def test_captions_and_uids():
    same, other = ["A  Cat\n", "a cat"], ["a cats"]
    found = keys.caption_keys(pa.array(same + other)).tolist()
    assert found[0] == found[1] != found[2]
    uids = keys.make_uids(pa.array(["u", "u", "v"]), pa.array(["c", "d", "c"])).to_pylist()
    assert len({*uids}) == 3 and uids[0][:8] == uids[1][:8] and uids[0][8:] == uids[2][8:]
    assert int.from_bytes(uids[0][:8], "big") == plain_hash("u", 2)
