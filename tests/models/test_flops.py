"""The analytic FLOP counts against XLA's own, and against every matrix product of a traced step.

XLA counts the body of a scan once, so the models compared with it have one layer. Formulas leave
out everything elementwise (norms, softmax, activations, RoPE): with 512 channels or more that is
under two percent of what XLA counts. Traced steps are of the true sizes; only shapes exist.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.models.intern_vit import InternViT, VitConfig
from internvl_jax.models.llama import Llama, LlamaConfig
from internvl_jax.models.qllama import causal_mask
from internvl_jax.train.experiment import resolve
from internvl_jax.train.step import value_and_grad
from internvl_jax.tree import unflatten

EXACT = Compute(dtype="float32", remat="none")


def counted_by_xla(make, call, *args) -> float:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    run = jax.jit(lambda state, *args: call(nnx.merge(graphdef, state), *args))
    return run.lower(state, *args).cost_analysis()["flops"]


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("options", [{}, dict(norm="layer", qk_norm=False, qkv_bias=True)])
def test_vision_tower_against_xla(options):
    cfg = VitConfig(width=768, depth=1, heads=6, mlp_dim=3072, **options)
    flops = counted_by_xla(
        lambda rngs: InternViT(cfg, EXACT, rngs=rngs),
        lambda model, images: model(images).tokens,
        array(3, 224, 224, 3),
    )
    assert 3 * cfg.flops() <= flops < 3 * cfg.flops() * 1.02
    deeper = dataclasses.replace(cfg, depth=7)
    block = cfg.flops() - dataclasses.replace(cfg, depth=0).flops()
    assert deeper.flops() - cfg.flops() == 6 * block


def test_decoder_against_xla():
    cfg = LlamaConfig(
        vocab_size=1000, width=512, depth=1, heads=8, kv_heads=2, head_dim=96, mlp_dim=1024
    )

    def call(model, ids, mask):
        positions = jnp.broadcast_to(jnp.arange(64), ids.shape)
        return model.logits(model(model.embed(ids), positions, causal_mask(mask)).hidden)

    flops = counted_by_xla(
        lambda rngs: Llama(cfg, EXACT, rngs=rngs),
        call,
        array(3, 64, dtype=jnp.int32),
        array(3, 64, dtype=jnp.bool_),
    )
    assert 3 * cfg.flops(64, logits=64) <= flops < 3 * cfg.flops(64, logits=64) * 1.02


def test_cross_attention_against_xla():
    cfg = LlamaConfig(
        width=512, depth=1, heads=8, mlp_dim=1024, cross_frequency=1, vision_width=640
    )

    def call(model, x, vision):
        positions = jnp.broadcast_to(jnp.arange(64), x.shape[:2])
        mask = jnp.ones((1, 64, 64), bool)
        return model(x, positions, mask, vision=vision, queries=24).hidden

    flops = counted_by_xla(
        lambda rngs: Llama(cfg, EXACT, rngs=rngs), call, array(3, 64, 512), array(3, 50, 640)
    )
    expected = 3 * cfg.flops(64, queries=24, vision_tokens=50)
    assert expected <= flops < expected * 1.02


def products(jaxpr: Any) -> int:
    """FLOPs of all matrix products of a traced function: scans in full, of branches the dearest."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[i] for i in contracted)
        if equation.primitive.name == "cond":
            total += max(products(branch.jaxpr) for branch in equation.params["branches"])
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


# Everything trained: within one percent. Frozen matrices: the formula counts two products for a
# frozen layer, but both factors of an attention product receive gradients; projectors are left out.
STEPS = {
    "stage0_language": ("", 0.01),
    "stage1_contrastive": ("", 0.01),
    "stage2_generative": ("", 0.04),
    "stage2_generative:retrieval": ("retrieval", 0.01),
    "stage3_finetune": ("", 0.01),
    "stage3_finetune:mlp": ("mlp", 0.05),
    "stage3_finetune:mlp,qllama": ("mlp,qllama", 0.05),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_step_of_true_size(name):
    argument, tolerance = STEPS[name]
    module = importlib.import_module(f"configs.{name.split(':')[0]}")
    stage = dataclasses.replace(resolve(module.get_config(argument)).stage, compute=EXACT)
    definition = Definition.of(stage.build, stage.trainable)
    trees: tuple[dict, dict] = ({}, {})
    for path, variable in definition.variables.items():
        leaf = variable.get_value()
        trees[not stage.trainable(path)][path] = array(*leaf.shape, dtype=leaf.dtype)
    batch = {**stage.batch_spec(8), "example": array(8, dtype=jnp.int32)}
    step = value_and_grad(stage, definition, 1, False)
    traced = jax.make_jaxpr(step)(*map(unflatten, trees), batch, jax.random.key(0))
    counted = products(traced.jaxpr) / 8
    assert (1 - tolerance) * counted < stage.flops() < 1.01 * counted
