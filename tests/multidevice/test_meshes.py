"""Every mesh gives the loss and the gradients of one device, in float32."""

from __future__ import annotations

import pytest

MESHES = [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4)]
LOSS, GRADIENT = 1e-6, 1e-5
# One of each kind in every run of the tests; the others are slow.
QUICK = {
    ("softmax", (1, 8, 1)),
    ("softmax", (2, 2, 2)),
    ("softmax", (1, 2, 4)),
    ("sigmoid", (2, 4, 1)),
    ("pretrain", (2, 2, 2)),
    ("retrieval", (1, 2, 4)),
    ("finetune", (1, 4, 2)),
    ("language", (2, 2, 2)),
    ("finetune lora", (1, 2, 4)),
}
STAGES = ("softmax", "sigmoid", "pretrain", "retrieval", "finetune", "language")


def cases():
    for stage in (*STAGES, "pretrain lora", "finetune lora"):
        for mesh in MESHES:
            marks = () if (stage, mesh) in QUICK else pytest.mark.slow
            yield pytest.param(stage, mesh, marks=marks, id=f"{stage}-{'x'.join(map(str, mesh))}")


@pytest.mark.parametrize(("stage", "mesh"), list(cases()))
def test_a_mesh_equals_one_device(computed, differ, stage, mesh):
    loss, gradient, where = differ(computed(stage, mesh), computed(stage))
    print(f"relative differences: loss {loss:.1e}, gradients {gradient:.1e} ({where})")
    assert loss < LOSS
    assert gradient < GRADIENT, where
