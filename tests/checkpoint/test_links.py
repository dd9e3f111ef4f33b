"""Leaves that rest in another checkpoint: written once, found again, missed in a sentence."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointSource,
    iter_leaves,
    read_tree,
)
from internvl_jax.checkpoint.integrity import fingerprint
from internvl_jax.checkpoint.links import Place
from internvl_jax.checkpoint.storage import Leaf, MissingBase, find_step, load_meta
from internvl_jax.tree import flatten

RUN = epath.Path("/runs/lora/checkpoints/4")


@pytest.mark.parametrize(
    ("base", "step", "spelled"),
    [
        ("/runs/base/checkpoints/8", RUN, "../../../base/checkpoints/8"),
        ("/runs/old/base/checkpoints/8", RUN, "../../../old/base/checkpoints/8"),
        ("/weights/base/checkpoints/8", RUN, "/weights/base/checkpoints/8"),
        ("/runs2/base/checkpoints/8", RUN, "/runs2/base/checkpoints/8"),
        ("gs://b/base/checkpoints/8", RUN, "gs://b/base/checkpoints/8"),
        (
            "gs://b/runs/base/checkpoints/8",
            epath.Path("gs://b/runs/lora/checkpoints/4"),
            "../../../base/checkpoints/8",
        ),
        (
            "gs://b/base/checkpoints/8",
            epath.Path("gs://b/lora/checkpoints/4"),
            "../../../base/checkpoints/8",
        ),
    ],
)
def test_a_place_is_spelled_from_the_folder_of_runs_where_both_lie_in_it(base, step, spelled):
    place = Place(base, "params/w")
    seen = place.seen_from(step)
    assert seen == Place(spelled, "params/w")
    assert seen.found_from(step) == place


@pytest.fixture
def put(mesh):
    return lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("r")))


@pytest.fixture
def tower(put):
    return put(np.random.default_rng(0).normal(size=(64, 1024)).astype("f4"))


@pytest.fixture
def base(tmp_path, put, tower):
    """A finished run that trained the tower, and a head that was frozen."""
    with Checkpoints(tmp_path / "base") as checkpoints:
        state = {"params": {"tower": tower}, "frozen": {"head": put(np.ones(8, np.float32))}}
        checkpoints.save(8, state, {})
    return tmp_path / "base"


def state_of(tower, put, step: int):
    return {
        "params": {"adapter": put(np.full(8, step, np.float32))},
        "frozen": {"tower": tower, "head": put(np.ones(8, np.float32))},
    }


def known(source: Path) -> dict[str, Leaf]:
    return {f"frozen/{path}": leaf for path, leaf in CheckpointSource(source).leaves().items()}


@pytest.fixture
def tuned(tmp_path, base, put, tower):
    """A run that started from it and trained an adapter alone: steps 4 and 8."""
    with Checkpoints(tmp_path / "tuned", link=True) as checkpoints:
        checkpoints.came_from(known(base))
        for step in (4, 8):
            checkpoints.save(step, state_of(tower, put, step), {"step": step})
    return tmp_path / "tuned"


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def leaves_of(workdir: Path) -> dict[str, Leaf]:
    return load_meta(find_step(workdir)).leaves


def test_only_what_changed_is_written(base, tuned, tower, put, assert_same):
    assert size(tuned / "checkpoints" / "4") < 32_000 < 64 * 1024 * 4 < size(base)
    expected = flatten(state_of(tower, put, 8))
    found = flatten(read_tree(tuned))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value)
    step = str(base / "checkpoints" / "8")
    assert {path: leaf.at for path, leaf in leaves_of(tuned).items()} == {
        "params/adapter": None,
        "frozen/tower": Place(step, "params/tower"),
        "frozen/head": Place(step, "frozen/head"),
    }
    assert {leaf.path for leaf in iter_leaves(tuned)} == set(expected)


def test_a_restored_run_goes_on_linking_or_stores_again(tuned, tower, put, shapes, assert_same):
    state = state_of(tower, put, 8)
    with Checkpoints(tuned, link=True) as checkpoints:
        restored, meta, step = checkpoints.restore(shapes(state))
        assert (meta, step) == ({"step": 8}, 8)
        assert_same(restored, state)
        checkpoints.save(12, restored, {})
    assert leaves_of(tuned)["frozen/tower"].at is not None
    with Checkpoints(tuned) as checkpoints:
        restored, _, _ = checkpoints.restore(shapes(state))
        checkpoints.save(16, restored, {})
    assert all(leaf.at is None for leaf in leaves_of(tuned).values())


def test_a_tower_that_rests_in_bfloat16_is_rounded_again(tmp_path, put, shapes):
    """Every way of rounding: bfloat16's neighbours, ties to even, and what overflows."""
    bits = (np.arange(512, dtype=np.uint32)[:, None] << 16) + np.uint32(0x3F000000)
    exact = bits + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    wide = put(np.concatenate([exact.view(np.float32), -exact.view(np.float32)]))
    with Checkpoints(tmp_path / "wide") as checkpoints:
        checkpoints.save(1, {"params": {"tower": wide}}, {})
    tower = jax.jit(lambda x: x.astype("bfloat16"))(wide)
    narrow = {"frozen": {"tower": tower}, "params": {"adapter": put(np.zeros(8, np.float32))}}
    leaf = Leaf((1024, 6), "bfloat16", fingerprint(tower))
    place = Place(str(tmp_path / "wide" / "checkpoints" / "1"), "params/tower")
    with Checkpoints(tmp_path / "tuned", link=True) as checkpoints:
        checkpoints.came_from({"frozen/tower": dataclasses.replace(leaf, at=place)})
        checkpoints.save(1, narrow, {})
        restored, _, _ = checkpoints.restore(shapes(narrow))
    assert leaves_of(tmp_path / "tuned")["frozen/tower"].at == place
    assert restored["frozen"]["tower"].dtype == "bfloat16"
    for found in (restored, read_tree(tmp_path / "tuned")):
        np.testing.assert_array_equal(found["frozen"]["tower"], tower)


def test_what_was_changed_or_cut_is_stored(tmp_path, base, put, tower):
    frozen = {
        "tower": tower.at[3, 5].add(1e-3),
        "half": tower.astype("bfloat16"),  # of which nobody says that it came from there
        "part": tower[:32],
    }
    origin = known(base)["frozen/tower"]
    with Checkpoints(tmp_path / "tuned", link=True) as checkpoints:
        checkpoints.came_from({f"frozen/{name}": origin for name in frozen})
        checkpoints.save(1, {"frozen": frozen}, {})
    assert all(leaf.at is None for leaf in leaves_of(tmp_path / "tuned").values())
    np.testing.assert_array_equal(read_tree(tmp_path / "tuned")["frozen"]["half"], frozen["half"])


def test_links_lead_to_the_original_and_not_to_links(tmp_path, base, tuned, put, tower):
    """A third run that started from the second survives the second's end."""
    with Checkpoints(tmp_path / "third", link=True) as checkpoints:
        checkpoints.came_from(known(tuned))
        checkpoints.save(1, state_of(tower, put, 1), {})
    shutil.rmtree(tuned)
    assert leaves_of(tmp_path / "third")["frozen/tower"].at == Place(
        str(base / "checkpoints" / "8"), "params/tower"
    )
    np.testing.assert_array_equal(read_tree(tmp_path / "third")["frozen"]["tower"], tower)


def test_a_folder_of_runs_can_be_moved(tmp_path, base, tuned, tower):
    moved = tmp_path / "elsewhere" / "runs"
    moved.mkdir(parents=True)
    for run in (base, tuned):
        shutil.move(run, moved / run.name)
    np.testing.assert_array_equal(read_tree(moved / "tuned")["frozen"]["tower"], tower)


def test_a_base_that_is_gone_is_named_and_nothing_is_set_aside(base, tuned, tower, put, shapes):
    base.rename(base.with_name("away"))
    place = str(base / "checkpoints" / "8")
    with Checkpoints(tuned, link=True) as checkpoints:
        with pytest.raises(MissingBase, match="move that checkpoint back") as caught:
            checkpoints.restore(shapes(state_of(tower, put, 8)))
        assert checkpoints.steps() == [4, 8]
    assert f"from {place}, which is not there" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tuned / "rejected").exists()
    with pytest.raises(CheckpointError, match="move that checkpoint back"):
        read_tree(tuned)
    base.with_name("away").rename(base)
    np.testing.assert_array_equal(read_tree(tuned)["frozen"]["tower"], tower)


def test_a_base_that_goes_during_the_run_is_written_down(base, tuned, tower, put, shapes, caplog):
    state = state_of(tower, put, 8)
    with Checkpoints(tuned, link=True) as checkpoints:
        restored, _, _ = checkpoints.restore(shapes(state))
        shutil.rmtree(base)
        assert checkpoints.save(12, restored, {})
        (said,) = checkpoints.check_errors()
    assert "is gone: step 12 stores what was taken from it" in said
    np.testing.assert_array_equal(read_tree(tuned)["frozen"]["tower"], tower)


def test_a_damaged_base_is_not_believed(base, tuned, tower, put, shapes):
    """Both steps need it: the sentence names it, and nothing is touched."""
    needle = np.asarray(tower)[40].tobytes()
    (file,) = [f for f in base.rglob("*") if f.is_file() and needle in f.read_bytes()]
    raw = bytearray(file.read_bytes())
    raw[raw.index(needle) + 7] ^= 4
    file.write_bytes(bytes(raw))
    with (
        Checkpoints(tuned, link=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"no checkpoint in .* can be restored") as caught,
    ):
        checkpoints.restore(shapes(state_of(tower, put, 8)))
    assert f"frozen/tower of {base / 'checkpoints' / '8'}" in str(caught.value)
    assert not (tuned / "rejected").exists()
    with pytest.raises(CheckpointError, match="frozen/tower is not what was written"):
        read_tree(tuned)


def test_a_step_that_stores_its_own_is_gone_back_to(base, tuned, tower, put, shapes, assert_same):
    """Step 12 stores, 16 links: with a damaged base the run goes back to 12."""
    state = state_of(tower, put, 12)
    with Checkpoints(tuned, keep=4) as checkpoints:
        checkpoints.save(12, state, {})
    with Checkpoints(tuned, keep=4, link=True) as checkpoints:
        checkpoints.came_from(known(base))
        checkpoints.save(16, state, {})
    for data in (base / "checkpoints" / "8" / "state").rglob("d"):
        shutil.rmtree(data)
    with Checkpoints(tuned, keep=4) as checkpoints:
        restored, _, step = checkpoints.restore(shapes(state))
    assert step == 12
    assert_same(restored, state)
