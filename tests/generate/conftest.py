"""Small models with pronounced random weights, so that searches take different ways."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.models.llama import Llama, LlamaConfig

EXACT = Compute(dtype="float32", remat="none")
VIT = VitConfig(image_size=28, width=16, depth=1, heads=2, mlp_dim=24)


def pronounced(make: Callable[[nnx.Rngs], nnx.Module], seed: int) -> nnx.Module:
    """A model whose matrices are drawn large; vectors (norms, biases) spread around one."""
    rng = np.random.default_rng(seed)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.normal(size=leaf.shape) * 0.5 if leaf.ndim > 1 else rng.normal(1, 0.2, leaf.shape)
        return jnp.asarray(x, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(draw, shapes))


@pytest.fixture(scope="session")
def drawn() -> Callable[[Callable[[nnx.Rngs], nnx.Module], int], nnx.Module]:
    """`pronounced`, for models that a test describes itself."""
    return pronounced


@pytest.fixture(scope="session")
def captioner() -> InternVL:
    """Grouped queries, tied head, cross-attention in layers 0 and 3 of 5 (period 3, tail 2)."""
    qllama = LlamaConfig(
        vocab_size=29,
        width=16,
        depth=5,
        heads=4,
        kv_heads=2,
        head_dim=6,
        mlp_dim=20,
        tied_head=True,
        cross_frequency=3,
        vision_width=16,
        pad_id=0,
    )
    cfg = InternVLConfig(vision=VIT, qllama=qllama, queries=3, embed_dim=8, pool_heads=2)
    return pronounced(lambda rngs: InternVL(cfg, EXACT, rngs=rngs), 1)


@pytest.fixture(scope="session")
def chatter() -> InternVLChat:
    """mlp1 glue into a decoder with biases, q/k-norm and one key-value head."""
    llm = LlamaConfig(
        vocab_size=29,
        width=16,
        depth=2,
        heads=4,
        kv_heads=1,
        mlp_dim=20,
        qkv_bias=True,
        qk_norm=True,
    )
    cfg = ChatConfig(vision=VIT, llm=llm, projector="mlp1")
    return pronounced(lambda rngs: InternVLChat(cfg, EXACT, rngs=rngs), 2)


@pytest.fixture(scope="session")
def decoder() -> Llama:
    """A decoder of so few words that EOS is always near."""
    cfg = LlamaConfig(vocab_size=9, width=12, depth=1, heads=2, mlp_dim=16)
    return pronounced(lambda rngs: Llama(cfg, EXACT, rngs=rngs), 3)
