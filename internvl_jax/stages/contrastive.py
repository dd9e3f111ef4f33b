"""Stage 1: vision-language contrastive training (paper, section 3.3 and Table 20)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.losses.contrastive import sigmoid_loss, softmax_loss
from internvl_jax.models.internvl import InternVL, InternVLConfig
from internvl_jax.models.presets import internvl_c_13b_224
from internvl_jax.sharding.rules import per_shard
from internvl_jax.stages.stage import Batch, EmbeddingStage, Metrics, randomness


@dataclasses.dataclass(frozen=True)
class ContrastiveStage(EmbeddingStage):
    """Symmetric contrastive loss over the global batch.

    Attributes:
        model: InternVL-C (queries=0).
        keep: fraction of the patch tokens that each training image keeps (FLIP-style masking).
        objective: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP; needs model.logit_bias).
        chunk: columns of the B x B logits that exist at a time on one device.
        label_smoothing: of the softmax targets.
    """

    model: InternVLConfig = dataclasses.field(default_factory=internvl_c_13b_224)
    trainable_paths: tuple[str, ...] = (
        "vision/",
        "qllama/(?!lm_head)",
        "clip_projector/",
        "text_projection",
        "logit_",
    )
    keep: float = 1.0
    objective: str = "softmax"
    chunk: int = 4096
    label_smoothing: float = 0.0

    name: ClassVar[str] = "contrastive"

    def __post_init__(self):
        if self.objective not in ("softmax", "sigmoid"):
            raise ValueError(f"objective={self.objective!r}: use softmax or sigmoid.")
        if (self.objective == "sigmoid") != (self.model.logit_bias is not None):
            raise ValueError(
                "model.logit_bias belongs to objective='sigmoid': set both or neither."
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must lie in (0, 1].")

    @property
    def patches(self) -> int:
        return (self.image_size // self.model.vision.patch_size) ** 2

    @property
    def kept(self) -> int | None:
        """Patch tokens that a training image keeps, None for all."""
        return None if self.keep == 1 else max(1, round(self.keep * self.patches))

    @property
    def vocab_size(self) -> int:
        return self.model.qllama.vocab_size

    def build(self, rngs: nnx.Rngs) -> InternVL:
        return InternVL(self.model, self.compute, rngs=rngs)

    def embed(self, model: InternVL, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        random = randomness(batch, key)
        keep = None if random is None else self.kept
        vision = model.image_tokens(self.images(batch), keep=keep, random=random)
        return {
            "image": model.clip_projector(vision),
            "text": model.text_embedding(batch["text"], batch["text_mask"], random=random),
        }

    def loss_from_embeddings(
        self, model: InternVL, embeddings: Any, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        scale = model.logit_scale[...]
        if self.objective == "sigmoid":

            def sigmoid(rows, scale, bias, axes):
                return sigmoid_loss(
                    rows["image"], rows["text"], scale, bias, axes=axes, chunk=self.chunk
                )

            loss, metrics = per_shard(sigmoid, embeddings, scale, model.logit_bias[...])
        else:

            def softmax(rows, scale, axes):
                return softmax_loss(
                    rows["image"],
                    rows["text"],
                    scale,
                    axes=axes,
                    chunk=self.chunk,
                    label_smoothing=self.label_smoothing,
                )

            loss, metrics = per_shard(softmax, embeddings, scale)
        return loss, {**metrics, "logit_scale": jnp.exp(scale)}

    def flops(self) -> int:
        kept = self.patches if self.kept is None else self.kept
        return 3 * (self.model.vision.flops(1 + kept) + self.model.qllama.flops(self.text_length))
