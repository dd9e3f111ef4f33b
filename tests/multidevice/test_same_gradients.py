"""Other ways to the same gradients: cached, accumulated, rematerialised, with padded heads."""

from __future__ import annotations

import dataclasses

import pytest

from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.sharding.mesh import MeshConfig, make_mesh
from internvl_jax.train.experiment import Experiment, TrainConfig

slow = pytest.mark.slow
WHOLE, MIXED = (1, 1, 1), (2, 2, 2)


@pytest.mark.parametrize(
    ("stage", "mesh", "parts"),
    [
        ("softmax", WHOLE, 4),
        pytest.param("softmax", MIXED, 2, marks=slow),
        pytest.param("sigmoid", WHOLE, 8, marks=slow),
    ],
)
def test_cached_gradients_equal_the_whole_batch(computed, differ, stage, mesh, parts):
    """Drop path and token masks included: they are drawn per example."""
    loss, gradient, where = differ(computed(stage, mesh, parts, True), computed(stage))
    assert loss < 1e-6
    assert gradient < 1e-5, where


@pytest.mark.parametrize(
    ("stage", "mesh", "parts"),
    [
        ("language", WHOLE, 4),
        ("finetune lora", WHOLE, 4),
        pytest.param("language", MIXED, 2, marks=slow),
        pytest.param("finetune", WHOLE, 4, marks=slow),
        pytest.param("finetune", MIXED, 2, marks=slow),
    ],
)
def test_accumulated_gradients_equal_the_whole_batch(computed, differ, stage, mesh, parts):
    """Microbatches with different numbers of learned tokens count by that number."""
    result, reference = computed(stage, mesh, parts), computed(stage)
    loss, gradient, where = differ(result, reference)
    assert loss < 1e-6
    assert gradient < 1e-5, where
    assert result.metrics["token_accuracy"] == pytest.approx(
        reference.metrics["token_accuracy"], abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "qkv,attn,fc1,gate,up"])
@pytest.mark.parametrize("stage", ["softmax", "pretrain", "finetune"])
def test_remat_changes_no_gradient(stages, computed, differ, stage, remat):
    name = f"{stage} with remat {remat}"
    compute = Compute(dtype="float32", remat=remat)
    stages[name] = dataclasses.replace(stages[stage], compute=compute)
    loss, gradient, where = differ(computed(name), computed(stage))
    assert loss < 1e-6
    assert gradient < 1e-5, where


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("stage", ["softmax", "retrieval", "finetune"])
def test_padded_heads_never_reach_a_checkpoint(stages, stage, tensor):
    """A run on a mesh pads its vision heads by itself; its parameters stay as they were."""
    mesh = make_mesh(MeshConfig(1, -1, tensor))
    experiment = Experiment(stages[stage], TrainConfig(steps=1, global_batch=16), {})
    padded = experiment.on(mesh).stage
    assert padded.compute.head_multiple == tensor
    assert experiment.on(mesh).schedule()[0][1].compute.head_multiple == tensor

    def shapes(stage):
        definition = Definition.of(stage.build, stage.trainable)
        return {path: v.get_value().shape for path, v in definition.variables.items()}

    assert shapes(padded) == shapes(stages[stage])
    assert shapes(padded)["vision/blocks/layers/attn/qkv"] == (2, 40, 3, 5, 8)


def test_a_multiple_set_by_hand_stays_a_factor(stages):
    stage = dataclasses.replace(
        stages["softmax"], compute=Compute(dtype="float32", head_multiple=3)
    )
    experiment = Experiment(stage, TrainConfig(steps=1, global_batch=16), {})
    assert experiment.on(make_mesh(MeshConfig(1, -1, 2))).stage.compute.head_multiple == 6
    assert experiment.on(make_mesh(MeshConfig(1, -1, 1))).stage.compute.head_multiple == 3
