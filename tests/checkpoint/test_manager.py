"""Saving, restoring, retention: one process, eight devices."""

from __future__ import annotations

import errno
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    iter_leaves,
    read_tree,
)


@pytest.mark.parametrize("async_", [True, False])
def test_round_trip(tmp_path, mesh, state_on, shapes, assert_same, async_):
    state = state_on(mesh, 1)
    with Checkpoints(tmp_path, async_=async_) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(5, state, {"data": {"position": 7}, "text": "ü"})
        assert checkpoints.wait() == checkpoints.committed == 5
        assert not checkpoints.save(5, state, {})
        restored, meta, step = checkpoints.restore(shapes(state))
        assert checkpoints.check_errors() == []
    assert (meta, step) == ({"data": {"position": 7}, "text": "ü"}, 5)
    assert_same(restored, state)
    assert all(
        a.sharding == b.sharding for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state))
    )


@pytest.mark.parametrize("rows, columns", [(8, 1), (1, 8), (4, 2), (1, 1)])
def test_restore_onto_another_mesh(
    tmp_path, mesh, mesh_of, state_on, shapes, assert_same, rows, columns
):
    state = state_on(mesh, 2)
    other = mesh_of(rows, columns)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _, _ = checkpoints.restore(shapes(state, other))
    assert_same(restored, state)
    assert {x.sharding.mesh for x in jax.tree.leaves(restored)} == {other}


def test_restore_within_a_mesh_context(tmp_path, mesh, mesh_of, state_on, shapes, assert_same):
    state = state_on(mesh, 2)
    with Checkpoints(tmp_path) as checkpoints, jax.set_mesh(mesh_of(4, 2)):
        checkpoints.save(1, state, {})
        restored, _, _ = checkpoints.restore(shapes(state, mesh_of(4, 2)))
    assert_same(restored, state)


def test_arrays_may_be_donated_once_save_returns(tmp_path, mesh, state_on, shapes, assert_same):
    bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    place = NamedSharding(mesh, PartitionSpec("r", "c"))
    state = {"w": jax.device_put(np.arange(1 << 18, dtype=np.float32).reshape(512, 512), place)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(20):
            state = bump(state)
        jax.block_until_ready(state)
        restored, _, step = checkpoints.restore(shapes(state))
        assert step == 1
        for _ in range(20):  # what was restored may be donated as well
            restored = bump(restored)
    assert_same(restored, state)


def test_any_containers_readable_paths(tmp_path, mesh, assert_same):
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    params = nnx.state(model)
    state = {"params": params, "opt": optax.adamw(1e-3).init(params)}
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(state, everywhere)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _, _ = checkpoints.restore(abstract)
    assert_same(restored, state)
    assert [leaf.path for leaf in iter_leaves(tmp_path)] == [
        "opt/0/count",
        "opt/0/mu/bias",
        "opt/0/mu/kernel",
        "opt/0/nu/bias",
        "opt/0/nu/kernel",
        "params/bias",
        "params/kernel",
    ]


def test_retention_keeps_last_every_and_best(tmp_path):
    accuracy = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.9, 5: 0.3, 6: float("nan"), 7: 0.1, 8: 0.2, 9: 0.1}
    state = {"w": np.zeros(3, np.float32)}
    with Checkpoints(tmp_path, keep=2, keep_every=3, best_metric="acc") as checkpoints:
        for step, value in accuracy.items():
            assert checkpoints.save(step, state, {}, metrics={"acc": value, "loss": 1.0})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4, 6, 8, 9]
        assert checkpoints.best() == 4
    with Checkpoints(tmp_path, keep=1, best_metric="acc", best_mode="min") as checkpoints:
        assert checkpoints.best() == 9
        checkpoints.save(10, state, {}, metrics={"acc": 0.05})
        checkpoints.save(11, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11]


def test_a_step_can_be_written_again_and_nothing_is_lost(tmp_path):
    one, two = ({"w": np.full(3, value, np.float32)} for value in (1, 2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, one, {})
        assert not checkpoints.save(1, two, {})
        assert checkpoints.save(1, two, {}, force=True)
        restored, _, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), np.float32)})
        checkpoints.wait()
    np.testing.assert_array_equal(restored["w"], two["w"])
    former = tmp_path / "rejected" / "1-0"
    reason = former.with_name("1-0.txt").read_text()
    assert reason == "it is being written again\n"
    former.rename(tmp_path / "rejected" / "1")
    np.testing.assert_array_equal(read_tree(tmp_path / "rejected", 1)["w"], one["w"])


def test_a_mismatch_is_one_sentence(tmp_path, mesh, state_on, shapes):
    state = state_on(mesh, 0)
    wanted = shapes(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})

        def refusal(change):
            tree = jax.tree.map(lambda x: x, wanted)
            change(tree["params"])
            with pytest.raises(CheckpointMismatch) as caught:
                checkpoints.restore(tree)
            text = str(caught.value)
            assert "\n" not in text and text.endswith(".") and str(tmp_path) in text
            return text

        head = wanted["params"]["head"]
        wide = jax.ShapeDtypeStruct((16, 9), head.dtype, sharding=head.sharding)
        text = refusal(lambda p: p.update(head=wide))
        assert "params/head as bfloat16[16,8] and the model expects bfloat16[16,9]" in text
        full = jax.ShapeDtypeStruct(head.shape, jnp.float32, sharding=head.sharding)
        text = refusal(lambda p: p.update(head=full))
        assert "bfloat16[16,8] and the model expects float32[16,8]; say cast=True" in text
        text = refusal(lambda p: p.update(tail=head))
        assert "doesn't hold params/tail, which the model expects" in text
        text = refusal(lambda p: p.pop("head"))
        assert "holds params/head, which the model doesn't have" in text
        assert checkpoints.steps() == [1]  # a wrong configuration condemns no checkpoint

        wanted["params"]["head"] = full
        restored, _, _ = checkpoints.restore(wanted, cast=True)
    np.testing.assert_array_equal(
        restored["params"]["head"], np.asarray(state["params"]["head"], np.float32)
    )
    assert restored["params"]["head"].sharding == head.sharding


def test_nothing_to_restore(tmp_path):
    wanted = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="no finished checkpoint in"):
            checkpoints.restore(wanted)
        checkpoints.save(1, {"w": np.zeros(3, np.float32)}, {})
        with pytest.raises(CheckpointError, match="no finished checkpoint of step 2"):
            checkpoints.restore(wanted, step=2)
    with pytest.raises(CheckpointError, match="has no finished checkpoint of step 2; it has 1"):
        read_tree(tmp_path, 2)
    with pytest.raises(CheckpointError, match="no finished checkpoint in"):
        read_tree(tmp_path / "elsewhere")


def test_what_can_not_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="leaf step is a int; make it an array"):
            checkpoints.save(1, {"step": 3}, {})
        with pytest.raises(TypeError, match="leaf rng is a PRNG key array"):
            checkpoints.save(1, {"rng": jax.random.key(0)}, {})
        assert checkpoints.steps() == []
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_stacked_leaves_are_read_layer_by_layer(tmp_path, mesh):
    place = NamedSharding(mesh, PartitionSpec(None, None, "c"))
    kernel = np.random.default_rng(0).normal(size=(3, 512, 512)).astype("f4")
    state = {"blocks": jax.device_put(kernel, place), "small": np.arange(12.0, dtype="f4")}
    with Checkpoints(tmp_path, stacked=lambda path: path.startswith("blocks")) as checkpoints:
        checkpoints.save(1, state, {})
    leaves = {leaf.path: leaf for leaf in iter_leaves(tmp_path)}
    assert leaves["blocks"]._store.chunk_layout.read_chunk.shape[0] == 1
    np.testing.assert_array_equal(leaves["blocks"][1, 5:7], kernel[1, 5:7])
    np.testing.assert_array_equal(np.stack(list(leaves["blocks"].rows())), kernel)
    np.testing.assert_array_equal(read_tree(tmp_path)["small"], state["small"])
    assert list(read_tree(tmp_path, prefix="nowhere")) == []


@pytest.mark.parametrize("async_", [True, False])
def test_a_full_disk_costs_one_save_and_not_the_run(
    tmp_path, assert_same, monkeypatch, caplog, async_
):
    from orbax.checkpoint import PyTreeCheckpointHandler

    states = [{"w": np.full((4, 4), value, np.float32)} for value in range(4)]
    healthy = PyTreeCheckpointHandler.finalize
    with Checkpoints(tmp_path, async_=async_) as checkpoints:
        checkpoints.save(1, states[1], {})
        assert checkpoints.wait() == 1

        def full(self, directory):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(PyTreeCheckpointHandler, "finalize", full)
        with caplog.at_level(logging.ERROR, "internvl_jax"):
            checkpoints.save(2, states[2], {})
            assert checkpoints.wait() == 1
        (sentence,) = checkpoints.check_errors()
        assert "saving step 2" in sentence and "No space left" in sentence
        assert sentence in caplog.messages and checkpoints.check_errors() == []
        assert "Traceback" not in caplog.text
        assert not (tmp_path / "checkpoints" / "2").exists()  # nothing half-written fills the disk
        restored, _, step = checkpoints.restore({"w": jax.ShapeDtypeStruct((4, 4), np.float32)})
        assert step == 1
        assert_same(restored, states[1])

        monkeypatch.setattr(PyTreeCheckpointHandler, "finalize", healthy)
        assert checkpoints.save(2, states[2], {}) and checkpoints.save(3, states[3], {})
        assert checkpoints.wait() == 3
        assert checkpoints.steps() == [1, 2, 3] and checkpoints.check_errors() == []


def test_opening_clears_what_a_killed_run_left(tmp_path):
    state = {"w": np.ones(3, np.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    half = pathlib.Path(tmp_path / "checkpoints" / "2" / "state")
    half.mkdir(parents=True)
    (half / "_METADATA").write_text("{")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, state, {})
        assert checkpoints.wait() == 2
