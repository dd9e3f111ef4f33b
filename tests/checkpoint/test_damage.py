"""Damage on disk: what was written comes back bit for bit, or an older step does, never else."""

from __future__ import annotations

import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from internvl_jax.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, read_tree


@pytest.fixture
def two_steps(tmp_path, mesh, state_on, shapes):
    """A work directory with steps 1 and 2, their states, the abstract state."""
    states = {step: state_on(mesh, step) for step in (1, 2)}
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"step": step})
    return tmp_path / "run", states, shapes(states[1])


def restore(workdir, abstract):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(abstract)


def flip(file: pathlib.Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(raw))


def files_of(step_dir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(f for f in step_dir.rglob("*") if f.is_file() and f.stat().st_size)


def test_a_flipped_bit_of_an_array_is_caught(tmp_path, mesh, shapes, assert_same, caplog):
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("r"))
    values = {s: np.random.default_rng(s).normal(size=(64, 64)).astype("f4") for s in (1, 2)}
    states = {s: {"params": {"w": jax.device_put(x, place)}} for s, x in values.items()}
    abstract = shapes(states[1])
    workdir = tmp_path / "run"
    with Checkpoints(workdir) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"step": step})
    needle = values[2][40].tobytes()
    step_dir = workdir / "checkpoints" / "2"
    (file,) = [f for f in files_of(step_dir) if needle in f.read_bytes()]
    flip(file, file.read_bytes().index(needle) * 8 + 3)

    with pytest.raises(CheckpointError, match="leaf params/w is not what was written"):
        read_tree(workdir, 2)
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match=r"params/w of .* its bits changed"):
            checkpoints.restore(abstract, step=2)
        restored, meta, step = checkpoints.restore(abstract)
        assert checkpoints.latest() == checkpoints.committed == 1
        assert checkpoints.save(2, states[2], {"step": 2})  # the way is free again
    assert (step, meta) == (1, {"step": 1})
    assert_same(restored, states[1])
    (sentence,) = [m for m in caplog.messages if "going back" in m]
    assert "step 2 is damaged" in sentence and str(workdir / "rejected" / "2-0") in sentence
    kept = workdir / "rejected" / "2-0"
    assert needle not in (kept / file.relative_to(step_dir)).read_bytes()
    assert "bits changed" in kept.with_name("2-0.txt").read_text()
    assert_same(restore(workdir, abstract)[0], states[2])


@pytest.mark.parametrize("seed", range(30))
def test_any_flipped_bit_gives_the_truth_or_an_older_truth(two_steps, assert_same, seed):
    workdir, states, abstract = two_steps
    rng = random.Random(seed)
    file = rng.choice(files_of(workdir / "checkpoints" / "2"))
    flip(file, rng.randrange(file.stat().st_size * 8))
    restored, meta, step = restore(workdir, abstract)
    assert_same(restored, states[step])
    assert meta == {"step": step}


def test_every_byte_of_array_data_matters(two_steps, tmp_path, assert_same):
    workdir, states, abstract = two_steps
    data = [f for f in files_of(workdir / "checkpoints" / "2") if "/d/" in str(f)]
    largest = max(data, key=lambda f: f.stat().st_size)
    caught = 0
    for n in range(8):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(workdir, copy)
        flip(copy / largest.relative_to(workdir), largest.stat().st_size * 8 * (2 * n + 1) // 16)
        restored, _, step = restore(copy, abstract)
        assert_same(restored, states[step])
        caught += step == 1
    assert caught >= 6  # a few bytes are the container's own


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "commit_success.txt").unlink(),
        lambda d: (d / "meta" / "metadata").unlink(),
        lambda d: (d / "meta" / "metadata").write_text("{"),
        lambda d: shutil.rmtree(d / "state"),
        lambda d: [shutil.rmtree(part) for part in d.rglob("d")],
        lambda d: (d / "state" / "manifest.ocdbt").unlink(),
        lambda d: (d / "state" / "manifest.ocdbt").write_bytes(b"\0" * 64),
        lambda d: [f.write_bytes(f.read_bytes()[:-40]) for f in (d / "state" / "d").iterdir()],
    ],
)
def test_a_half_deleted_step_falls_back_to_the_one_before(two_steps, assert_same, damage):
    workdir, states, abstract = two_steps
    damage(workdir / "checkpoints" / "2")
    restored, meta, step = restore(workdir, abstract)
    assert (step, meta) == (1, {"step": 1})
    assert_same(restored, states[1])


@pytest.mark.parametrize("name", ["_METADATA", "_sharding", "array_metadatas"])
def test_what_is_not_needed_may_be_missing(two_steps, assert_same, name):
    workdir, states, abstract = two_steps
    lost = workdir / "checkpoints" / "2" / "state" / name
    lost.unlink() if lost.is_file() else shutil.rmtree(lost)
    restored, _, step = restore(workdir, abstract)
    assert step == 2
    assert_same(restored, states[2])


def test_an_altered_meta_file_is_not_believed(two_steps, assert_same):
    workdir, states, abstract = two_steps
    meta = workdir / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"shape": [16, 8]', '"shape": [16, 9]'))
    restored, _, step = restore(workdir, abstract)  # damage, not a mismatch of configurations
    assert step == 1
    assert_same(restored, states[1])


def test_nothing_is_moved_when_nothing_can_be_restored(two_steps):
    workdir, _, abstract = two_steps
    for step in (1, 2):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "state")
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract)
        assert checkpoints.steps() == [1, 2]
    text = str(caught.value)
    assert "step 1: " in text and "step 2: " in text and "\n" not in text
    assert not (workdir / "rejected").exists()


def test_a_wrong_configuration_does_not_fall_back(two_steps):
    workdir, _, abstract = two_steps
    abstract["params"]["scale"] = jax.ShapeDtypeStruct((2,), np.float32)
    with pytest.raises(CheckpointMismatch), Checkpoints(workdir) as checkpoints:
        checkpoints.restore(abstract)
    assert not (workdir / "rejected").exists()


def test_replicas_that_differ_are_not_saved(tmp_path, mesh, caplog):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    parts = [jax.device_put(np.full(4, d == 3, np.float32), x) for d, x in enumerate(jax.devices())]
    torn = jax.make_array_from_single_device_arrays((4,), sharding, parts)
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.save(1, {"w": torn}, {})
        (sentence,) = checkpoints.check_errors()
        assert checkpoints.wait() is None
    assert "step 1 was not saved" in sentence and "different copies of leaf w" in sentence
