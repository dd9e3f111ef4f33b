"""A stage small enough to compute by hand, and the tiny configs on generated pictures."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from internvl_jax.nn.param import normal, param, zeros
from internvl_jax.stages.stage import EmbeddingStage


class Line(nnx.Module):
    """y = frozen * (x @ kernel + bias)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.kernel = param(rngs, (3, 2), ("embed", None), normal(1.0))
        self.bias = param(rngs, (2,), (None,), zeros)
        self.frozen = param(rngs, (2,), (None,), normal(1.0))


@dataclasses.dataclass(frozen=True)
class LineStage(EmbeddingStage):
    """Mean squared output; its loss is a function of embeddings, so gradients can be cached."""

    trainable_paths: tuple[str, ...] = ("kernel", "bias")

    name: ClassVar[str] = "line"

    def build(self, rngs: nnx.Rngs) -> Line:
        return Line(rngs=rngs)

    def embed(self, model: Any, batch: Any, key: jax.Array | None) -> jax.Array:
        return (batch["x"] @ model.kernel[...] + model.bias[...]) * model.frozen[...]

    def loss_from_embeddings(self, model: Any, embeddings: Any, batch: Any):
        loss = jnp.mean(jnp.sum(embeddings**2, axis=-1))
        return loss, {"largest": jnp.max(jnp.abs(embeddings))}


@pytest.fixture(scope="session")
def line() -> LineStage:
    return LineStage()
