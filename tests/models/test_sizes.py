"""The published models have their published sizes, counted twice: by formula and by shape."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest
from flax import nnx

from internvl_jax.models import presets
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import InternViT, VitConfig
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.models.llama import Llama, LlamaConfig

MODELS = {
    VitConfig: InternViT,
    LlamaConfig: Llama,
    InternVLConfig: InternVL,
    ChatConfig: InternVLChat,
}
# From the released checkpoints: the sums of their tensors' sizes. The chat models are the sums of
# their parts (tower at 577 positions, projector, Vicuna).
TRUE = {
    "internvit_6b_224": (presets.internvit_6b_224(), 5_902_793_600),
    "internvit_6b_448": (presets.internvit_6b_448(), 5_905_251_200),
    "internvit_300m_448": (presets.internvit_300m_448(), 304_012_288),
    "qllama_8b": (presets.qllama_8b(), 7_841_912_832),
    "internvl_14b_224": (presets.internvl_14b_224(), 13_834_975_747),
    # The stage-1 file leaves the output head out; ours keeps it.
    "internvl_c_13b_224": (presets.internvl_c_13b_224(), 12_620_029_697 + 204_611_584),
    "vicuna_7b": (presets.vicuna_7b(), 6_738_415_616),
    "vicuna_13b": (presets.vicuna_13b(), 13_015_864_320),
    "chat_vit_vicuna_7b": (presets.chat_vit_vicuna(presets.vicuna_7b()), 12_672_125_824),
    "chat_vit_vicuna_13b": (presets.chat_vit_vicuna(presets.vicuna_13b()), 18_962_290_560),
    "chat_qllama_vicuna_7b": (
        presets.chat_qllama_vicuna(presets.vicuna_7b()),
        13_745_099_648 + 63_455_232 + 6_738_415_616,
    ),
}
SMALL = VitConfig(image_size=28, width=12, depth=2, heads=3, mlp_dim=20)
TINY = LlamaConfig(vocab_size=30, width=16, depth=5, heads=4, mlp_dim=24)
VARIANTS = {
    "layer norms, biases": dataclasses.replace(SMALL, norm="layer", qkv_bias=True, qk_norm=False),
    "both norms, biases": dataclasses.replace(SMALL, qkv_bias=True),
    "grouped queries": dataclasses.replace(TINY, kv_heads=2, head_dim=6),
    "InternLM": dataclasses.replace(TINY, qkv_bias=True, out_bias=True, kv_heads=1),
    "Qwen3": dataclasses.replace(TINY, qk_norm=True, head_dim=8, tied_head=True),
    "no head": dataclasses.replace(TINY, head=False),
    "cross-attention, tail": dataclasses.replace(TINY, cross_frequency=3, vision_width=12),
    "fewer layers than a period": dataclasses.replace(
        TINY, depth=2, cross_frequency=3, vision_width=12
    ),
    "sigmoid": InternVLConfig(
        vision=SMALL, qllama=TINY, queries=0, embed_dim=8, pool_heads=4, logit_bias=-10.0
    ),
    "mlp1": ChatConfig(vision=SMALL, llm=TINY, projector="mlp1"),
    "queries alone": ChatConfig(
        vision=SMALL,
        llm=TINY,
        qllama=dataclasses.replace(TINY, cross_frequency=2, vision_width=12),
        queries=3,
        projector="none",
    ),
}


def count(config) -> int:
    make = MODELS[type(config)]
    model = nnx.eval_shape(lambda: make(config, Compute(), rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("name", TRUE)
def test_published_sizes(name):
    config, size = TRUE[name]
    assert config.param_count() == size
    assert count(config) == size


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_is_counted(name):
    assert VARIANTS[name].param_count() == count(VARIANTS[name])


def test_the_stage_one_model_is_part_of_the_whole():
    """14 B = stage 1 + queries, cross-attention, second projector and matching head."""
    added = 393_216 + 956_418_048 + 53_515_008 + 8_194
    assert presets.internvl_14b_224().param_count() == (
        presets.internvl_c_13b_224().param_count() + added
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(width=100, heads=3), "vision.width=100 is not a multiple of vision.heads=3"),
        (dict(image_size=100), "vision.image_size=100 is not a multiple of patch_size=14"),
        (dict(drop_path_mode="cosine"), "use 'uniform' or 'linear'"),
    ],
)
def test_impossible_towers(values, message):
    with pytest.raises(ValueError, match=message):
        VitConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(width=100, heads=3), "width=100 is not a multiple of heads=3: set head_dim"),
        (dict(heads=32, kv_heads=5), "heads=32 is not a multiple of kv_heads=5"),
        (dict(vision_width=64), "cross_frequency is 0: say how often"),
    ],
)
def test_impossible_decoders(values, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**values)


def test_impossible_combinations():
    plain = dataclasses.replace(TINY, cross_frequency=2, vision_width=13)
    with pytest.raises(ValueError, match=r"must equal vision.width=12"):
        InternVLConfig(vision=SMALL, qllama=plain, queries=3)
    with pytest.raises(ValueError, match="queries=0 builds no cross-attention"):
        InternVLConfig(vision=SMALL, qllama=plain, queries=0)
    with pytest.raises(ValueError, match="qllama and queries go together"):
        ChatConfig(vision=SMALL, llm=TINY, queries=3)
    with pytest.raises(ValueError, match="would leave the language model blind"):
        ChatConfig(vision=SMALL, llm=TINY, projector="none")
    with pytest.raises(ValueError, match=r"select_layer=-3 lies outside -2..-1"):
        ChatConfig(vision=SMALL, llm=TINY, select_layer=-3)
    with pytest.raises(ValueError, match="Unknown projector 'linear'"):
        ChatConfig(vision=SMALL, llm=TINY, projector="linear")
