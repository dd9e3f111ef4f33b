"""Tiny models of random parameters, and a tokenizer of the shapes set."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines.corpus import make_corpus
from data_pipelines.datasets import open_dataset
from data_pipelines.text import Tokenizer, train
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import VitConfig
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.internvl_chat import ChatConfig, InternVLChat
from internvl_jax.models.llama import LlamaConfig

VIT = VitConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, mlp_dim=32)
COMPUTE = Compute(dtype="float32", remat="none")


def text_config(vocab_size: int, **settings) -> LlamaConfig:
    return LlamaConfig(vocab_size, width=16, depth=1, heads=2, mlp_dim=32, pad_id=3, **settings)


def random_model(build: Callable[[], nnx.Module]) -> nnx.Module:
    """A module with drawn parameters; to run its own initialisation would take longer."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(build))
    draw = lambda leaf: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype))
    return nnx.merge(graphdef, jax.tree.map(draw, state))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    corpus = make_corpus(open_dataset("shapes").training_concepts())
    return train(corpus, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=500)


@pytest.fixture(scope="session")
def model(tokenizer) -> InternVL:
    text = text_config(tokenizer.vocab_size, cross_frequency=1, vision_width=16)
    config = InternVLConfig(vision=VIT, qllama=text, queries=2, embed_dim=8, pool_heads=2)
    return random_model(lambda: InternVL(config, COMPUTE, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="session")
def chat_model(tokenizer) -> InternVLChat:
    config = ChatConfig(vision=VIT, llm=text_config(tokenizer.vocab_size), projector="mlp1")
    return random_model(lambda: InternVLChat(config, COMPUTE, rngs=nnx.Rngs(0)))
