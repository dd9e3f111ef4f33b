"""Stage 0: a short language-model training of a decoder.

It stands in for the pretrained LLaMA that the paper starts from, where none is at hand: stages 1
and 2 never train the output head, so it must come from somewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.losses.captioning import TokenTotals, chunked_next_token_loss
from internvl_jax.models.llama import Llama, LlamaConfig
from internvl_jax.models.qllama import causal_mask
from internvl_jax.sharding.rules import per_shard
from internvl_jax.stages.stage import Batch, Metrics, Stage, randomness


class LanguageModel(nnx.Module):
    """A decoder under the name it has inside the larger models."""

    def __init__(self, cfg: LlamaConfig, stage: LanguageStage, *, rngs: nnx.Rngs):
        self.llm = Llama(cfg, stage.compute.of("llm"), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class LanguageStage(Stage):
    """Next-token prediction on plain text.

    Attributes:
        model: the decoder; with QLLaMA's cross_frequency it has the layout stage 1 continues.
        chunk: tokens whose logits exist at a time on one device.
    """

    model: LlamaConfig = LlamaConfig()
    chunk: int = 4096

    name: ClassVar[str] = "language"

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def build(self, rngs: nnx.Rngs) -> LanguageModel:
        return LanguageModel(self.model, self, rngs=rngs)

    def weight(self, batch: Batch) -> jax.Array:
        return label_count(batch["labels"])

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        text = batch["text"]
        positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
        mask, random = causal_mask(batch["text_mask"]), randomness(batch, key)
        hidden = model.llm(model.llm.embed(text), positions, mask, random=random).hidden
        return next_token_mean(hidden, model.llm.head_kernel(), batch["labels"], self.chunk)

    def flops(self) -> int:
        return 3 * self.model.flops(self.text_length, logits=self.text_length)


def label_count(labels: jax.Array) -> jax.Array:
    """Number of learned positions after the shift, float32."""
    return jnp.sum(labels[:, 1:] >= 0).astype(jnp.float32)


def token_totals(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    chunk: int,
    row_weights: jax.Array | None = None,
) -> TokenTotals:
    """`chunked_next_token_loss` of the global batch, each device doing its own rows."""
    rows = {"hidden": hidden, "labels": labels}
    if row_weights is not None:
        rows["weights"] = row_weights

    def shard(rows: Batch, kernel: jax.Array, axes: tuple[str, ...]) -> TokenTotals:
        return chunked_next_token_loss(
            rows["hidden"],
            kernel,
            rows["labels"],
            chunk=chunk,
            row_weights=rows.get("weights"),
            axes=axes,
        )

    return per_shard(shard, rows, kernel)


def next_token_mean(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, chunk: int
) -> tuple[jax.Array, Metrics]:
    """Mean next-token loss and accuracy over the learned positions of the global batch."""
    total = token_totals(hidden, kernel, labels, chunk)
    count = jnp.maximum(total.count, 1.0)
    loss = total.loss / count
    return loss, {"token_accuracy": total.correct / count, "perplexity": jnp.exp(loss)}
