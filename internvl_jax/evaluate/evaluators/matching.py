"""Image-text matching: does this name fit this picture (the ITM head of stage 2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.evaluation import Gallery, mismatches
from data_pipelines.text import Tokenizer
from internvl_jax.evaluate.embed import in_batches
from internvl_jax.evaluate.evaluators.selection import thin
from internvl_jax.models.intern_vit import normalize_images


@dataclasses.dataclass(frozen=True)
class Matching:
    """Accuracy on balanced pairs: every picture once with its name, once with another concept's.

    The wrong names are drawn evenly and do not change (`data_pipelines.evaluation.mismatches`). A
    pair counts as right if its class has the larger logit; equal logits are wrong either way.
    Figures per language: ``itm_accuracy``, ``itm_match`` (accuracy on the right names),
    ``itm_other`` (on the wrong ones), ``itm_chance`` and ``itm_n`` (pairs); and over all languages
    without the language's code.

    Attributes:
        gallery: pictures and candidates.
        tokenizer: of the model.
        text_length: T.
        name: of the list.
        limit: at most so many pictures, evenly spread.
        batch_size: pictures per call of the model.
    """

    gallery: Gallery
    tokenizer: Tokenizer
    text_length: int
    name: str = "fluent"
    limit: int | None = None
    batch_size: int = 64

    def run(self, model: Any) -> dict[str, float]:
        """`model` is an `InternVL` with queries."""
        return self.score(self.logits(model))

    def logits(self, model: Any) -> np.ndarray:
        """Matching logits float32 [n, languages, 2, 2]: right name and wrong name, no and yes."""
        shown = thin(self.gallery, self.limit)
        pairs = []
        for language, texts in shown.names.items():
            for target in (shown.target, mismatches(shown, language)):
                captions = [texts[i] for i in target]
                pairs.append(self.tokenizer.encode_batch(captions, self.text_length))
        ids, masks = (np.stack(rows, axis=1) for rows in zip(*pairs))  # [n, 2 languages, T]
        graphdef, state = nnx.split(model)
        function = functools.partial(_logits, graphdef, state)
        out = in_batches(function, (shown.images, ids, masks), self.batch_size)
        return out.reshape(len(shown.images), len(shown.names), 2, 2)

    def score(self, logits: np.ndarray) -> dict[str, float]:
        """The figures, from what `logits` returns."""
        out: dict[str, float] = {}
        margin = logits[..., 1] - logits[..., 0]  # [n, languages, right or wrong name]
        scopes = {self.name: margin}
        scopes |= {
            f"{self.name}.{language}": margin[:, i : i + 1]
            for i, language in enumerate(self.gallery.names)
        }
        for scope, margins in scopes.items():
            match = float(np.mean(margins[..., 0] > 0))
            other = float(np.mean(margins[..., 1] < 0))
            figures = {
                "accuracy": (match + other) / 2,
                "match": match,
                "other": other,
                "chance": 0.5,
                "n": float(margins.size),
            }
            out |= {f"{scope}.itm_{key}": value for key, value in figures.items()}
        return out


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, state: Any, images: Any, text: Any, text_mask: Any) -> jax.Array:
    """Pictures [B, S, S, 3], K texts of each [B, K, T] -> [B, K, 2]."""
    model = nnx.merge(graphdef, state)
    B, K, T = text.shape
    vision = model.image_tokens(normalize_images(jnp.asarray(images)))
    scores = model.matching_score(vision, text.reshape(B * K, T), text_mask.reshape(B * K, T))
    return scores.reshape(B, K, 2)
