"""The demo's parts fit together before anything is trained."""

from __future__ import annotations

import jax
import pytest

from configs import demo
from internvl_jax.checkpoint.transfer import Transfer, plan
from internvl_jax.models.definition import Definition
from internvl_jax.sharding.mesh import one_device
from internvl_jax.train.experiment import resolve
from internvl_jax.tree import flatten
from launch import local


def parameters(stage: str) -> dict[str, jax.ShapeDtypeStruct]:
    trained = resolve(demo.get_config(stage)).stage
    trees = Definition.of(trained.build, trained.trainable).abstract(one_device(), "float32")
    return {path: leaf for tree in trees for path, leaf in flatten(tree).items()}


class Shapes:
    """Another stage's parameters as a source, without arrays."""

    name = "an earlier stage"

    def __init__(self, stages: dict[str, dict[str, str]]):
        self._leaves = {}
        for stage, rename in stages.items():
            for path, leaf in parameters(stage).items():
                head, _, rest = path.partition("/")
                new = "/".join(filter(None, (rename.get(head, head), rest)))
                self._leaves.setdefault(new, leaf)

    def leaves(self):
        return self._leaves

    def read(self, wanted):
        raise AssertionError("shapes suffice")


@pytest.mark.parametrize("stage", demo.STAGES)
def test_every_stage_resolves_and_starts_from_the_ones_before(stage):
    for arg in (stage, f"{stage},fast"):
        experiment = resolve(demo.get_config(arg))
        assert experiment.schedule()[-1][0] == experiment.train.steps
    init = experiment.init
    if not init.sources:
        return
    names = {s.path.rsplit("/", 1)[-1]: dict(s.rename) for s in init.sources}
    earlier = demo.STAGES[: demo.STAGES.index(stage)]
    assert set(names) <= set(earlier)
    source = Shapes(names)
    report = plan(
        parameters(stage), Transfer(source, new_ok=init.new_ok, dropped_ok=init.dropped_ok)
    )
    assert report.loaded and not report.resized


def test_judged_stages_are_stages_and_have_titles():
    assert set(local.EVALUATED) <= set(demo.STAGES)
    assert set(demo.STAGES) <= set(local.TITLES)


def test_an_unknown_stage_is_named():
    with pytest.raises(ValueError, match="contrastiv"):
        demo.get_config("contrastiv")
