"""Gradient caching: a contrastive loss over a batch whose activations do not fit.

Embed all microbatches without keeping activations, differentiate the loss with respect to the
embeddings, then embed every microbatch once more and pull its share of that gradient back
(https://arxiv.org/abs/2101.06983). The gradients equal the whole batch's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from internvl_jax.models.definition import Definition, Tree
from internvl_jax.stages.stage import Batch, EmbeddingStage, Metrics, Stage
from internvl_jax.train import microbatch


def value_and_grad(
    stage: Stage, definition: Definition, n: int
) -> Callable[[Tree, Tree, Batch, jax.Array], tuple[jax.Array, Metrics, Tree]]:
    """(params, frozen, batch, key) -> loss, metrics, gradients, in `n` microbatches."""
    if not isinstance(stage, EmbeddingStage):
        raise ValueError(
            f"Gradient caching needs a stage whose loss is a function of embeddings; "
            f"{type(stage).__name__} is not: use accumulate without grad_cache."
        )

    def embed(params: Tree, frozen: Tree, part: Batch, key: jax.Array):
        return stage.embed(definition.merge(params, frozen), part, key)

    def run(params: Tree, frozen: Tree, batch: Batch, key: jax.Array):
        parts = microbatch.split(batch, n)
        embeddings = jax.lax.map(lambda part: embed(params, frozen, part, key), parts)
        whole = microbatch.join(embeddings)

        def head(params: Tree, embeddings):
            return stage.loss_from_embeddings(definition.merge(params, frozen), embeddings, batch)

        (loss, metrics), (grads, cotangent) = jax.value_and_grad(head, (0, 1), has_aux=True)(
            params, whole
        )
        pieces = microbatch.split(cotangent, n)

        def body(grads: Tree, inputs):
            part, piece = inputs
            _, pull = jax.vjp(lambda p: embed(p, frozen, part, key), params)
            return jax.tree.map(jnp.add, grads, pull(piece)[0]), None

        grads, _ = jax.lax.scan(body, grads, (parts, pieces))
        return loss, metrics, grads

    return run
