"""Named sizes. Each returns a config with the true sizes of a published model."""

from __future__ import annotations

import dataclasses

from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig
from internvl_jax.models.llama import LlamaConfig


def internvit_6b_224() -> VitConfig:
    """InternViT-6B-224px: 5,902,793,600 parameters (paper, Table 1)."""
    return VitConfig()


def internvit_6b_448() -> VitConfig:
    """InternViT-6B-448px-V1-0: 48 layers, 1,025 positions."""
    return VitConfig(image_size=448)


def internvit_300m_448() -> VitConfig:
    """InternViT-300M-448px: LayerNorm, qkv bias, no QK-norm; 304,012,288 parameters."""
    return VitConfig(
        image_size=448,
        width=1024,
        depth=24,
        heads=16,
        mlp_dim=4096,
        norm="layer",
        qk_norm=False,
        qkv_bias=True,
    )


def qllama_8b() -> LlamaConfig:
    """QLLaMA: multilingual LLaMA-7B with cross-attention in every second layer; 7,841,912,832."""
    return LlamaConfig(cross_frequency=2, vision_width=3200, pad_id=0)


def internvl_14b_224() -> InternVLConfig:
    """InternVL-14B-224px: 13,834,975,747 parameters."""
    return InternVLConfig(vision=internvit_6b_224(), qllama=qllama_8b())


def internvl_c_13b_224() -> InternVLConfig:
    """The model of stage 1: no queries and no cross-attention, but QLLaMA's layout and its head."""
    text = dataclasses.replace(qllama_8b(), vision_width=0)
    return InternVLConfig(vision=internvit_6b_224(), qllama=text, queries=0)


def qwen_1_5b() -> LlamaConfig:
    """Qwen2.5-1.5B as InternVL3-2B has it: its own vocabulary, the head untied."""
    return LlamaConfig(
        vocab_size=151674,
        width=1536,
        depth=28,
        heads=12,
        kv_heads=2,
        mlp_dim=8960,
        eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
    )


def vicuna_7b() -> LlamaConfig:
    """Vicuna v1.5 7B (LLaMA-2 sizes)."""
    return LlamaConfig(vocab_size=32000, eps=1e-5)


def vicuna_13b() -> LlamaConfig:
    """Vicuna v1.5 13B (LLaMA-2 sizes)."""
    return LlamaConfig(vocab_size=32000, width=5120, depth=40, heads=40, mlp_dim=13824, eps=1e-5)


def chat_vit_vicuna(llm: LlamaConfig, image_size: int = 336) -> ChatConfig:
    """InternVL-Chat without QLLaMA: ViT layer -4 through ``mlp2x_gelu`` (LLaVA-1.5's recipe)."""
    return ChatConfig(vision=VitConfig(image_size=image_size), llm=llm, select_layer=-4)


def chat_2b() -> ChatConfig:
    """InternVL3-2B's sizes: InternViT-300M through ``mlp1`` into Qwen2.5-1.5B."""
    return ChatConfig(vision=internvit_300m_448(), llm=qwen_1_5b(), projector="mlp1")


def chat_qllama_vicuna(llm: LlamaConfig) -> ChatConfig:
    """InternVL-Chat with QLLaMA: ``two_mlp``, 96 queries before the patches."""
    return ChatConfig(
        vision=internvit_6b_224(), llm=llm, qllama=qllama_8b(), queries=96, select_layer=-4
    )
