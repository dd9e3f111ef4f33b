"""Hand-over between stages: every leaf accounted for, surprises refused; and where a run starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.checkpoint import (
    ArraySource,
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    CheckpointSource,
    Transfer,
    initialize,
    scratch_from,
)
from internvl_jax.checkpoint.transfer import load, plan
from internvl_jax.tree import flatten, unflatten


def arrays(seed=0):
    """Parameters of a first stage, by path."""
    rng = np.random.default_rng(seed)
    return {
        "tower/blocks/qkv": rng.normal(size=(2, 8, 24)).astype("f4"),
        "tower/position": rng.normal(size=(1, 16, 8)).astype("f4"),
        "text/embed": rng.normal(size=(32, 8)).astype("f4"),
        "text/lm_head": rng.normal(size=(8, 32)).astype("f4"),
    }


def abstract(mesh, **changed):
    """Parameters of a second stage: the tower is called vision, a head is new."""
    leaves = {
        "vision/blocks/qkv": ((2, 8, 24), np.float32, (None, "r", "c")),
        "vision/position": ((1, 16, 8), np.float32, ()),
        "text/embed": ((32, 8), np.float32, ("c",)),
        "itm_head": ((8, 2), np.float32, ("r",)),
    } | changed
    return {
        path: jax.ShapeDtypeStruct(
            shape, np.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for path, (shape, dtype, spec) in leaves.items()
    }


RENAME = (("tower", "vision"),)
ANNOUNCED = {"rename": RENAME, "new_ok": ("itm_.*",), "dropped_ok": (r"text/lm_head",)}


@pytest.fixture
def stage1(tmp_path):
    """A finished first stage whose text tower was frozen, with optimizer state."""
    values = arrays()
    params = {path: x for path, x in values.items() if path.startswith("tower")}
    frozen = {path: x for path, x in values.items() if path.startswith("text")}
    state = {
        "params": unflatten(params),
        "frozen": unflatten(frozen),
        "ema": {"tower": {"position": values["tower/position"] + 1}},
        "opt": {"mu": unflatten(params)},
    }
    with Checkpoints(tmp_path / "stage1") as checkpoints:
        checkpoints.save(90, jax.tree.map(np.zeros_like, state), {})
        checkpoints.save(100, state, {})
    return tmp_path / "stage1"


def test_handoff_loads_renames_and_reports(stage1, mesh):
    target = abstract(mesh)
    loaded, report = load(target, Transfer(CheckpointSource(stage1), **ANNOUNCED))
    values = arrays()
    np.testing.assert_array_equal(loaded["vision/blocks/qkv"], values["tower/blocks/qkv"])
    np.testing.assert_array_equal(loaded["text/embed"], values["text/embed"])
    assert {p: x.sharding for p, x in loaded.items()} == {p: target[p].sharding for p in loaded}
    assert (report.new, report.dropped) == (("itm_head",), ("text/lm_head",))
    assert report.loaded["vision/position"] == "tower/position"
    assert str(stage1 / "checkpoints" / "100") in report.summary()
    assert report.summary().startswith("loaded 3 (768 values), resized 0, new 1, dropped 1 from ")
    lines = [line.split() for line in report.table().splitlines()[1:]]
    assert ["loaded", "vision/…", "2", "leaves,", "512", "values"] in lines
    assert ["new", "itm_head", "float32[8,2]"] in lines
    assert ["dropped", "text/lm_head", "float32[8,32]"] in lines


def test_handoff_of_a_chosen_step_and_of_averages(stage1, mesh):
    target = abstract(mesh)
    loaded, _ = load(target, Transfer(CheckpointSource(stage1, 90), **ANNOUNCED))
    assert not any(np.any(x) for x in loaded.values())
    averages = CheckpointSource(stage1 / "checkpoints" / "100", roots=("ema", "params", "frozen"))
    loaded, _ = load(target, Transfer(averages, **ANNOUNCED))
    np.testing.assert_array_equal(loaded["vision/position"], arrays()["tower/position"] + 1)
    np.testing.assert_array_equal(loaded["vision/blocks/qkv"], arrays()["tower/blocks/qkv"])
    with pytest.raises(CheckpointError, match="no part named weights to take parameters from"):
        CheckpointSource(stage1, roots=("weights",)).leaves()


def test_handoff_resizes_and_converts_when_told_to(stage1, mesh):
    def crop(table, shape):
        return table[:, : shape[1]] * 2

    target = abstract(
        mesh,
        **{
            "vision/position": ((1, 9, 8), jnp.bfloat16, ()),
            "text/embed": ((32, 8), jnp.bfloat16, ("c",)),
        },
    )
    source = CheckpointSource(stage1)
    with pytest.raises(CheckpointMismatch, match=r"float32\[1,16,8\] -> bfloat16\[1,9,8\]"):
        load(target, Transfer(source, **ANNOUNCED))
    with pytest.raises(CheckpointMismatch, match=r"vision/position is .* give a resize rule"):
        load(target, Transfer(source, cast=True, **ANNOUNCED))
    resize = ((".*/position", crop),)
    loaded, report = load(target, Transfer(source, cast=True, resize=resize, **ANNOUNCED))
    expected = (arrays()["tower/position"][:, :9] * 2).astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded["vision/position"], expected)
    np.testing.assert_array_equal(loaded["text/embed"], arrays()["text/embed"].astype(jnp.bfloat16))
    assert loaded["vision/position"].sharding == target["vision/position"].sharding
    assert report.resized == {"vision/position": "tower/position"}
    assert report.notes["text/embed"] == "float32[32,8] -> bfloat16[32,8]"
    wrong = ((".*/position", lambda table, shape: table),)
    with pytest.raises(CheckpointMismatch, match=r"vision/position gave float32\[1,16,8\]"):
        load(target, Transfer(source, cast=True, resize=wrong, **ANNOUNCED))


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ({"new_ok": ()}, "doesn't hold itm_head; rename parameters, or list them in new_ok"),
        ({"dropped_ok": ()}, "no place for text/lm_head of .*, or list them in dropped_ok"),
        ({"rename": (("towers", "vision"),)}, "rule towers -> vision fits no parameter"),
        ({"rename": (("tow", "vision"),)}, "rule tow -> vision fits no parameter"),
        (
            {"rename": (("tower", "text/embed"), ("text/embed", "text/embed/position"))},
            "text/embed and tower/position of .* are both renamed to text/embed/position",
        ),
        (
            {"rename": ()},
            r"doesn't hold vision/blocks/qkv, vision/position \(did you mean to rename tower/",
        ),
    ],
)
def test_surprises_are_refused(mesh, rules, sentence):
    transfer = Transfer(ArraySource(unflatten(arrays())), **(ANNOUNCED | rules))
    with pytest.raises(CheckpointMismatch, match=sentence) as caught:
        plan(abstract(mesh), transfer)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_many_surprises_name_the_first_few():
    target = {f"w{n}": jax.ShapeDtypeStruct((1,), np.float32) for n in range(9)}
    with pytest.raises(CheckpointMismatch, match="doesn't hold w0, w1, w2 and 6 more"):
        plan(target, Transfer(ArraySource({"x": np.zeros(1)})))


def test_prefixes_are_whole_components_and_the_root_has_one():
    target = {f"text/{p}": jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays().items()}
    report = plan(target, Transfer(ArraySource(unflatten(arrays())), rename=(("", "text"),)))
    assert report.loaded["text/tower/position"] == "tower/position"
    back = {f"text/{p}": x for p, x in arrays().items()}
    target = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays().items()}
    report = plan(target, Transfer(ArraySource(unflatten(back)), rename=(("text", ""),)))
    assert report.loaded["text/embed"] == "text/text/embed"


def test_precedence(tmp_path, stage1, mesh):
    target = unflatten(abstract(mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def init():
        return jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), target)

    def assemble(params):
        return {"params": params, "count": jax.device_put(np.int32(0), everywhere)}

    count = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
    state = {"params": target, "count": count}
    made = []

    def scratch(paths):
        made.append(sorted(paths))
        return scratch_from(init, target)(paths)

    handoff = Transfer(CheckpointSource(stage1), **ANNOUNCED)
    weights = Transfer(ArraySource(unflatten(arrays(1)), "downloaded"), **ANNOUNCED)
    gone = Transfer(CheckpointSource(tmp_path / "gone"), **ANNOUNCED)

    def start(checkpoints, **sources):
        return initialize(checkpoints, state, target, scratch=scratch, assemble=assemble, **sources)

    with Checkpoints(tmp_path / "stage2") as checkpoints:
        begun = start(checkpoints)
        assert (begun.origin, begun.step, begun.report) == ("scratch", 0, None)
        assert made.pop() == sorted(flatten(target))
        assert np.all(np.asarray(begun.state["params"]["itm_head"]) == 7)

        begun = start(checkpoints, weights=weights)
        assert (begun.origin, begun.report.source) == ("weights", "downloaded")
        embed = np.asarray(begun.state["params"]["text"]["embed"])
        np.testing.assert_array_equal(embed, arrays(1)["text/embed"])

        begun = start(checkpoints, handoff=handoff, weights=weights)
        assert begun.origin == "handoff" and made.pop() == ["itm_head"]
        params = begun.state["params"]
        np.testing.assert_array_equal(params["text"]["embed"], arrays()["text/embed"])
        assert np.all(np.asarray(params["itm_head"]) == 7)
        assert params["itm_head"].sharding == target["itm_head"].sharding
        with pytest.raises(CheckpointError, match=r"no finished checkpoint in .*gone"):
            start(checkpoints, handoff=gone)

        changed = {"params": jax.tree.map(lambda x: x + 1, params), "count": begun.state["count"]}
        checkpoints.save(12, changed, {"examples": 96})
        checkpoints.wait()
        begun = start(checkpoints, handoff=gone, weights=weights)  # the source may be gone by now
        assert (begun.origin, begun.step, begun.meta) == ("resume", 12, {"examples": 96})
        np.testing.assert_array_equal(
            begun.state["params"]["text"]["embed"], arrays()["text/embed"] + 1
        )


def test_scratch_computes_only_what_is_asked_for(mesh):
    target = unflatten(abstract(mesh))

    def init():
        return jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), target
        )

    scratch = scratch_from(init, target)
    assert scratch([]) == {}
    made = scratch(["itm_head"])
    assert list(made) == ["itm_head"]
    np.testing.assert_allclose(made["itm_head"], init()["itm_head"], rtol=1e-6)
    everything = scratch(list(flatten(target)))
    np.testing.assert_array_equal(everything["itm_head"], made["itm_head"])
    assert {p: x.sharding for p, x in everything.items()} == {
        p: x.sharding for p, x in flatten(target).items()
    }
