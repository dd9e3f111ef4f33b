"""Stage 2: vision-language generative training (paper, section 3.3 and Table 20).

One QLLaMA pass reads every image through rows [queries][text], a row per task; ViT runs once:

* ``pretrain``: ITM | ITC | ITG, the released stage-2 loss;
* ``retrieval``: ITM-negative | ITM-positive | ITC with soft targets, the loss of the released
  retrieval fine-tuning, which also trains the ViT's own projector.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvl_jax.losses.contrastive import softmax_loss
from internvl_jax.losses.matching import matching_loss, sample_hard_negatives
from internvl_jax.models.internvl import InternVL, InternVLConfig, unit
from internvl_jax.models.qllama import query_text_mask
from internvl_jax.nn.regularize import Randomness
from internvl_jax.sharding.rules import constrain, per_shard
from internvl_jax.stages.language import token_totals
from internvl_jax.stages.stage import Batch, Metrics, Stage, randomness

TRAIN_QUERIES = ("query_tokens", ".*/cross/", "clip_projector2/", "itm_", "logit_scale")
"""What stage 2 trains: 1.01 of 13.8 billion parameters."""


@dataclasses.dataclass(frozen=True)
class GenerativeStage(Stage):
    """Image-text matching, contrastive and captioning losses through the queries.

    Attributes:
        model: InternVL with queries.
        variant: ``pretrain`` or ``retrieval``.
        hard_negatives: draw each image's negative text by similarity (BLIP-2) instead of taking the
            loader's uniform one (the released code).
        label_smoothing: of the pre-training ITC targets.
        empty_caption: number of tokens of an empty caption; such ITM rows are ignored. None where
            no caption is empty.
        empty_summary: the same for "summarize:" and nothing else (5 with LLaMA's tokenizer).
        loss_weights: of ITM, ITC and ITG; 1 : 1 : 1 in the paper.
        chunk: logits that exist at a time on one device: columns of ITC, tokens of ITG.
        layer_decay: learning-rate factor per layer of depth below the last; 1 is off.
    """

    model: InternVLConfig = InternVLConfig()
    trainable_paths: tuple[str, ...] = TRAIN_QUERIES
    variant: str = "pretrain"
    hard_negatives: bool = False
    label_smoothing: float = 0.0
    empty_caption: int | None = None
    empty_summary: int | None = None
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    chunk: int = 4096
    layer_decay: float = 1.0

    name: ClassVar[str] = "generative"

    def __post_init__(self):
        if self.variant not in ("pretrain", "retrieval"):
            raise ValueError(f"variant={self.variant!r}: use pretrain or retrieval.")
        if not self.model.queries:
            raise ValueError("The generative stage needs queries: set model.queries above 0.")

    @property
    def vocab_size(self) -> int:
        return self.model.qllama.vocab_size

    def build(self, rngs: nnx.Rngs) -> InternVL:
        return InternVL(self.model, self.compute, rngs=rngs)

    def lr_scale(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        return super().lr_scale(path, shape) * self._decay(path)

    def _decay(self, path: str) -> float | np.ndarray:
        """Layer-wise decay with the released ids: embeddings 0, layer i at i + 1, heads last."""
        if self.layer_decay == 1.0:
            return 1.0
        vision = path.startswith(("vision/", "clip_projector/"))
        depth = self.model.vision.depth if vision else self.model.qllama.depth
        period = 1 if vision else self.model.qllama.period
        last = depth + 1
        whole = depth // period
        if "/layers/" in path:
            slot = int(path.split("/rest/")[1].split("/")[0]) + 1 if "/rest/" in path else 0
            ids = np.arange(whole) * period + slot + 1
        elif "/tail/" in path:
            slot = int(path.split("/rest/")[1].split("/")[0]) + 1 if "/rest/" in path else 0
            ids = np.int64(whole * period + slot + 1)
        elif path.startswith(("vision/", "query_tokens", "logit_scale", "qllama/embedding")):
            ids = np.int64(0)
        else:
            ids = np.int64(last)
        # The released layer count is depth + 2, and the factor decay^(count - 1 - id).
        return self.layer_decay ** (last - ids).astype(np.float64)

    def loss(
        self, model: InternVL, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        return self.grouped_loss(model, batch, key, groups=1)

    def grouped_loss(
        self, model: InternVL, batch: Batch, key: jax.Array | None, *, groups: int
    ) -> tuple[jax.Array, Metrics]:
        """The loss as `groups` data-parallel ranks of the released code would compute it.

        The released code divides by each rank's own count of kept rows and splits ITM's positives
        from its negatives rank by rank; training here uses one group, the global batch.
        """
        images = self.images(batch)
        random = randomness(batch, key)
        vision = model.image_tokens(images, random=random)
        if self.hard_negatives:
            batch = {**batch, **self._mine(model, vision, batch, key)}
        rows = self._pretrain if self.variant == "pretrain" else self._retrieval
        return rows(model, vision, batch, random, groups)

    def _pretrain(
        self,
        model: InternVL,
        vision: jax.Array,
        batch: Batch,
        random: Randomness | None,
        groups: int,
    ) -> tuple[jax.Array, Metrics]:
        B, Q = vision.shape[0], self.model.queries
        position = jnp.arange(B) % (B // groups)
        # The first rows of each group show a wrong caption, the last half of them the right one.
        match = position >= B // groups - B // groups // 2
        itm_ids = jnp.where(match[:, None], batch["positive"], batch["negative"])
        itm_mask = jnp.where(match[:, None], batch["positive_mask"], batch["negative_mask"])
        hidden = self._fused(
            model,
            vision,
            random,
            (itm_ids, itm_mask, "itm"),
            (batch["summarize"], batch["summarize_mask"], "itc"),
            (batch["text"], batch["text_mask"], "itg"),
        )
        itm, itc, itg = (hidden[:, i] for i in range(3))

        logits = jnp.mean(model.match_logits(itm[:, :Q]), axis=1)
        weights = _row_weights(_not_empty(itm_mask, self.empty_caption), groups)
        loss_itm, itm_metrics = matching_loss(logits, match.astype(jnp.int32), weights=weights)

        embeddings = {
            "image": model.clip_projector2(itc[:, :Q]),
            "text": model.project_text(itc[:, Q:], batch["summarize_mask"]),
            "weights": _row_weights(
                _not_empty(batch["summarize_mask"], self.empty_summary), groups
            ),
        }
        scale = model.logit_scale[...]

        def shard(rows, scale, axes):
            return softmax_loss(
                rows["image"],
                rows["text"],
                scale,
                weights=rows["weights"],
                axes=axes,
                chunk=self.chunk,
                label_smoothing=self.label_smoothing,
            )

        loss_itc, itc_metrics = per_shard(shard, embeddings, scale)

        labels = batch["labels"]
        counts = jnp.sum(labels[:, 1:] >= 0, axis=1).astype(jnp.float32).reshape(groups, -1)
        per_token = jnp.repeat(1.0 / jnp.maximum(jnp.sum(counts, 1), 1.0) / groups, B // groups)
        itg_total = token_totals(
            itg[:, Q:], model.qllama.head_kernel(), labels, self.chunk, per_token
        )
        loss_itg = itg_total.loss
        metrics = {
            "loss_itm": loss_itm,
            "loss_itc": loss_itc,
            "loss_itg": loss_itg,
            "itm_accuracy": itm_metrics["accuracy"],
            "itg_token_accuracy": itg_total.correct / jnp.maximum(itg_total.count, 1.0),
            **{f"itc_{k}": v for k, v in itc_metrics.items()},
            "logit_scale": jnp.exp(scale),
        }
        itm_weight, itc_weight, itg_weight = self.loss_weights
        return itm_weight * loss_itm + itc_weight * loss_itc + itg_weight * loss_itg, metrics

    def _retrieval(
        self,
        model: InternVL,
        vision: jax.Array,
        batch: Batch,
        random: Randomness | None,
        groups: int,
    ) -> tuple[jax.Array, Metrics]:
        B, Q = vision.shape[0], self.model.queries
        hidden = self._fused(
            model,
            vision,
            random,
            (batch["negative"], batch["negative_mask"], "itm"),
            (batch["positive"], batch["positive_mask"], "itm"),
            (batch["summarize"], batch["summarize_mask"], "itc"),
        )
        logits = jnp.mean(model.match_logits(hidden[:, :2, :Q].reshape(2 * B, Q, -1)), axis=1)
        match = jnp.tile(jnp.array([0, 1], jnp.int32), B)
        masks = jnp.stack([batch["negative_mask"], batch["positive_mask"]], axis=1)
        weights = _row_weights(_not_empty(masks.reshape(2 * B, -1), self.empty_caption), groups)
        loss_itm, itm_metrics = matching_loss(logits, match, weights=weights)

        itc = hidden[:, 2]
        embeddings = {
            "image": model.clip_projector2(itc[:, :Q]),
            "backbone": model.clip_projector(vision),
            "text": model.project_text(itc[:, Q:], batch["summarize_mask"]),
            "weights": _row_weights(
                _not_empty(batch["summarize_mask"], self.empty_summary), groups
            ),
            "ids": batch["image_id"],
        }
        scale = model.logit_scale[...]

        def shard(rows, scale, axes):
            losses, metrics = zip(
                *(
                    softmax_loss(
                        rows[name],
                        rows["text"],
                        scale,
                        weights=rows["weights"],
                        ids=rows["ids"],
                        axes=axes,
                        chunk=self.chunk,
                    )
                    for name in ("image", "backbone")
                ),
                strict=True,
            )
            return sum(losses), metrics[0]

        loss_itc, itc_metrics = per_shard(shard, embeddings, scale)
        metrics = {
            "loss_itm": loss_itm,
            "loss_itc": loss_itc,
            "itm_accuracy": itm_metrics["accuracy"],
            **{f"itc_{k}": v for k, v in itc_metrics.items()},
            "logit_scale": jnp.exp(scale),
        }
        itm_weight, itc_weight, _ = self.loss_weights
        return itm_weight * loss_itm + itc_weight * loss_itc, metrics

    def _fused(
        self, model: InternVL, vision: jax.Array, random: Randomness | None, *rows: Any
    ) -> jax.Array:
        """One pass over R rows per image: (ids, mask, use) each -> hidden [B, R, Q + T, D]."""
        B = vision.shape[0]
        ids = jnp.stack([r[0] for r in rows], axis=1)
        masks = jnp.stack([query_text_mask(self.model.queries, r[1], r[2]) for r in rows], axis=1)
        flat = lambda x: constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))
        hidden = model.fused(vision, flat(ids), flat(masks), random=random).hidden
        return hidden.reshape(B, len(rows), *hidden.shape[1:])

    def _mine(
        self, model: InternVL, vision: jax.Array, batch: Batch, key: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Negatives drawn by similarity from the batch's other captions, without gradient."""
        if key is None:
            return {}
        image = unit(model.clip_projector(vision))
        text = unit(model.text_embedding(batch["summarize"], batch["summarize_mask"]))
        similarity = jnp.exp(model.logit_scale[...]) * image @ text.T
        similarity = jax.lax.stop_gradient(constrain(similarity, "batch", None))
        index = sample_hard_negatives(similarity, batch["image_id"], jax.random.fold_in(key, 2**30))
        found = (index >= 0)[:, None]  # else every other caption is right too: keep the loader's
        return {
            "negative": jnp.where(found, batch["positive"][index], batch["negative"]),
            "negative_mask": jnp.where(
                found, batch["positive_mask"][index], batch["negative_mask"]
            ),
        }

    def flops(self) -> int:
        vision, text = self.model.vision, self.model.qllama
        Q, T = self.model.queries, self.text_length
        P = 1 + (self.image_size // vision.patch_size) ** 2
        # Three rows per image; their queries share the image's keys and values.
        logits = T if self.variant == "pretrain" else 0
        rows = 3 * text.flops(Q + T) + text.flops(0, queries=3 * Q, vision_tokens=P, logits=logits)
        # A frozen matrix costs the forward product and the one that carries the gradient on.
        towers = self.trainable("vision/patch/kernel")
        total = (3 * vision.flops(P) + 3 * rows) if towers else (vision.flops(P) + 2 * rows)
        if vision.lora and not towers:  # the gradient is carried on to the first adapter
            total += vision.flops(P)
        return total + (text.flops(T) if self.hard_negatives else 0)


def _not_empty(mask: jax.Array, empty: int | None) -> jax.Array:
    """Rows whose text is more than an empty caption: bool [B, T] -> bool [B]."""
    if empty is None:
        return jnp.ones(mask.shape[0], bool)
    return jnp.sum(mask.astype(jnp.int32), axis=1) != empty


def _row_weights(keep: jax.Array, groups: int) -> jax.Array:
    """Weights that sum to one: each group's mean over its kept rows, averaged over the groups."""
    kept = keep.astype(jnp.float32).reshape(groups, -1)
    return (kept / jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), 1.0) / groups).reshape(-1)
