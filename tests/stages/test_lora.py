"""Whole models with adapters are the models with merged kernels, in both stages that train them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.batch import IMAGE_TOKEN
from internvl_jax.models.adapters import adapter_scale, without_adapters
from internvl_jax.models.compute import Compute
from internvl_jax.models.definition import Definition
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig
from internvl_jax.nn.lora import LoraConfig, adapters, merged
from internvl_jax.stages.finetune import FinetuneStage
from internvl_jax.stages.generative import GenerativeStage

LORA = LoraConfig(rank=3, alpha=2.0, dropout=0.0)
VISION = VitConfig(image_size=16, patch_size=8, width=24, depth=1, heads=3, mlp_dim=16, lora=LORA)
# Three layers in periods of two: a stack and a tail.
TEXT = LlamaConfig(
    vocab_size=40, width=16, depth=3, heads=4, kv_heads=2, mlp_dim=24, qkv_bias=True, lora=LORA
)
QLLAMA = dataclasses.replace(TEXT, cross_frequency=2, vision_width=24)
EXACT = Compute(dtype="float32", remat="none")
QUICK = {"xla_backend_optimization_level": 0}  # the programs run once
STAGES: dict[str, Any] = {
    "generative": GenerativeStage(
        model=InternVLConfig(vision=VISION, qllama=QLLAMA, queries=3, embed_dim=8, pool_heads=4),
        image_size=16,
        text_length=6,
        compute=EXACT,
    ),
    "finetune": FinetuneStage(
        model=ChatConfig(vision=VISION, llm=TEXT, qllama=QLLAMA, queries=3),
        image_size=16,
        text_length=14,
        compute=EXACT,
    ),
}


def without(stage: Any) -> Any:
    """The stage of the same model without adapters."""
    return dataclasses.replace(stage, model=without_adapters(stage.model))


def merge_all(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    plain = {path: x for path, x in values.items() if "_lora/" not in path}
    for kernel, (a, b) in adapters(values).items():
        parts = values[kernel], values[a], values[b]
        if "/layers/" in kernel:
            plain[kernel] = jnp.stack(
                [merged(*one, LORA.scale) for one in zip(*parts, strict=True)]
            )
        else:
            plain[kernel] = merged(*parts, LORA.scale)
    return plain


@pytest.fixture(scope="module", params=STAGES)
def case(request):
    """A stage, its definition, drawn parameters, and a loss of them without dropout."""
    stage = STAGES[request.param]
    definition = Definition.of(stage.build, lambda path: "_lora/" in path)
    rng = np.random.default_rng(0)
    values = {}
    for path, variable in definition.variables.items():
        shape = variable.get_value().shape
        small = "scale" in path or path.endswith("ls1") or path.endswith("ls2")
        values[path] = jnp.asarray(rng.normal(size=shape) * 0.3 + small, jnp.float32)
    return stage, definition, values


@pytest.fixture
def batch(case, batch_of):
    """A batch of four; in conversations an image first, of three queries and four patches."""
    stage = case[0]
    made = batch_of(stage, 4)
    if stage.name != "finetune":
        return made
    text = made["text"].at[:, 1:8].set(IMAGE_TOKEN)
    labels = made["labels"].at[:, :8].set(-100)
    return {**made, "text": text, "labels": labels, "segment": jnp.ones_like(text)}


def test_losses_and_gradients_are_those_of_the_merged_model(case, batch):
    stage, definition, values = case
    bare = without(stage)
    plain = Definition.of(bare.build, lambda path: True)

    def loss(trained):
        return stage.loss(definition.merge({**values, **trained}), batch, None)[0]

    def dense_loss(kernels):
        everything = {**merge_all(values), **kernels}
        return bare.loss(plain.merge(everything), batch, None)[0]

    trained = {path: x for path, x in values.items() if "_lora/" in path}
    kernels = {path: x for path, x in merge_all(values).items() if path in adapters(values)}
    mine, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(trained)
    wanted, dense = jax.jit(jax.value_and_grad(dense_loss), compiler_options=QUICK)(kernels)
    assert mine == pytest.approx(float(wanted), rel=1e-5)
    assert len(grads) == 2 * len(kernels)
    largest = max(np.abs(g).max() for g in grads.values())
    for kernel, (a, b) in adapters(values).items():
        # d loss / da = scale dW b', d loss / db = scale a' dW, layer by layer.
        stacked = "/layers/" in kernel
        parts = [
            np.asarray(x) if stacked else np.asarray(x)[None]
            for x in (dense[kernel], values[a], values[b], grads[a], grads[b])
        ]
        for dw, one_a, one_b, da, db in zip(*parts, strict=True):
            inputs, rank = math.prod(one_a.shape[:-1]), one_a.shape[-1]
            dw = dw.reshape(inputs, -1) * LORA.scale
            for got, expected in (
                (da, dw @ one_b.reshape(rank, -1).T),
                (db, one_a.reshape(inputs, rank).T @ dw),
            ):
                bound = 1e-4 * max(np.abs(expected).max(), 1e-3 * largest)
                np.testing.assert_allclose(
                    got.reshape(expected.shape), expected, atol=bound, err_msg=kernel
                )


def test_parameters_are_counted(case):
    stage, _, values = case
    assert stage.model.param_count() == sum(x.size for x in values.values())
    assert without(stage).model.param_count() == sum(
        x.size for path, x in values.items() if "_lora/" not in path
    )


def test_scales_are_the_towers():
    cfg = STAGES["generative"].model
    other = dataclasses.replace(cfg, vision=dataclasses.replace(VISION, lora=LoraConfig(rank=8)))
    assert adapter_scale(other, "vision/blocks/layers/attn/qkv") == 2
    assert adapter_scale(other, "qllama/tail/first/attn/q") == LORA.scale
    assert adapter_scale(VISION, "blocks/layers/attn/qkv") == LORA.scale  # a tower alone
    with pytest.raises(ValueError, match="has no adapters there"):
        adapter_scale(without_adapters(cfg), "vision/blocks/layers/attn/qkv")


def test_wrong_targets_are_named():
    wrong = LoraConfig(targets=("attn/qkv", "mlp/gate"))
    with pytest.raises(ValueError, match="'mlp/gate': use some of attn/qkv, attn/out, mlp/fc1"):
        dataclasses.replace(VISION, lora=wrong)
    with pytest.raises(ValueError, match="'attn/qkv': use some of attn/q"):
        dataclasses.replace(TEXT, lora=wrong)
