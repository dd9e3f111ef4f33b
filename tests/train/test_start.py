"""Where a run starts: shardings of everything it keeps, renamed sources, a resized table."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from internvl_jax.checkpoint import Checkpoints, read_tree
from internvl_jax.models.definition import Definition
from internvl_jax.nn.embed import resize_positions
from internvl_jax.sharding.mesh import MeshConfig, make_mesh
from internvl_jax.train.experiment import InitConfig, SourceConfig
from internvl_jax.train.optimizer import make_optimizer
from internvl_jax.train.start import JoinedSource, abstract_state, loaded, start, stored
from internvl_jax.tree import flatten


def prepared(experiment, mesh):
    stage = experiment.stage
    definition = Definition.of(stage.build, stage.trainable)
    params, _ = definition.abstract(mesh, "float32")
    return definition, make_optimizer(experiment.optim, 8, params, stage.lr_scale)


@pytest.mark.parametrize("name", ["stage1_contrastive", "stage2_generative", "stage3_finetune"])
def test_moments_and_average_live_where_their_parameter_does(tiny, name):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    experiment = tiny(name, optim__ema=0.9)
    definition, tx = prepared(experiment, mesh)
    state, frozen = abstract_state(definition, tx, experiment, mesh)
    params = flatten(state.params)
    assert any("fsdp" in x.sharding.spec for x in params.values())
    assert any("tensor" in x.sharding.spec for x in params.values())
    assert {p: x.sharding for p, x in flatten(state.ema).items()} == {
        p: x.sharding for p, x in params.items()
    }
    placed = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt):
        path = "/".join(str(k.key) for k in keys if hasattr(k, "key"))
        if leaf.ndim == 0 and path not in params:
            assert leaf.sharding.is_fully_replicated
        else:
            assert leaf.sharding == params[path].sharding, path
            placed += 1
    assert placed == 2 * len(params)  # first and second moments, of nothing else
    assert not set(flatten(frozen)) & set(params)


def test_a_checkpoint_holds_all_of_it_and_gives_it_back(tiny):
    mesh = make_mesh(MeshConfig(1, 8, 1))
    experiment = tiny("stage2_generative")
    definition, tx = prepared(experiment, mesh)
    state, frozen = abstract_state(definition, tx, experiment, mesh)
    tree = stored(state, frozen)
    assert set(tree) >= {"params", "frozen", "ema", "opt", "step", "skipped", "bad_streak"}
    again, rest = loaded(tree)
    assert again == state and rest == frozen


def test_sources_join_under_new_names(chain):
    first = SourceConfig(str(chain["contrastive"].workdir), rename=(("vision", "tower"),))
    second = SourceConfig(str(chain["language"].workdir))
    source = JoinedSource(InitConfig(sources=(first, second)))
    leaves = source.leaves()
    assert {"tower/pos", "qllama/embedding", "llm/embedding"} <= set(leaves)
    assert not any(p.startswith("vision/") for p in leaves)
    wanted = {
        p: jax.ShapeDtypeStruct(leaves[p].shape, "float32") for p in ("tower/pos", "llm/embedding")
    }
    read = source.read(wanted)
    tower = flatten(read_tree(chain["contrastive"].workdir))["params/vision/pos"]
    words = flatten(read_tree(chain["language"].workdir))["params/llm/embedding"]
    np.testing.assert_array_equal(read["tower/pos"], tower)
    np.testing.assert_array_equal(read["llm/embedding"], words)


def test_a_larger_picture_takes_the_table_along(chain, tmp_path):
    """4 x 4 positions become 6 x 6, as torch would resize them."""
    experiment = chain["generative"].experiment
    model = experiment.stage.model
    vision = dataclasses.replace(model.vision, image_size=48)
    stage = dataclasses.replace(
        experiment.stage, image_size=48, model=dataclasses.replace(model, vision=vision)
    )
    init = InitConfig(sources=(SourceConfig(str(chain["generative"].workdir)),))
    experiment = dataclasses.replace(experiment, stage=stage, init=init)
    mesh = make_mesh(MeshConfig(1, 8, 1))
    definition, tx = prepared(experiment, mesh)
    checkpoints = Checkpoints(str(tmp_path))
    with jax.set_mesh(mesh):
        begun = start(definition, tx, experiment, mesh, checkpoints)
    checkpoints.close()
    assert begun.step == 0
    assert set(begun.report.resized) == {"vision/pos"} and begun.report.new == ()
    table = flatten(read_tree(chain["generative"].workdir))["frozen/vision/pos"]
    found = flatten(begun.state)["frozen/vision/pos"]
    np.testing.assert_allclose(found, resize_positions(jax.numpy.asarray(table), (6, 6)), atol=1e-6)
