"""InternVL-C and InternVL-G: the two towers, the queries and the heads (paper, section 3.2)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.models.attention_pool import AttentionPool, pool_param_count
from internvl_jax.models.compute import Compute
from internvl_jax.models.intern_vit import InternViT, VitConfig
from internvl_jax.models.llama import Llama, LlamaConfig, LlamaOutput
from internvl_jax.models.qllama import causal_mask, query_text_mask
from internvl_jax.nn.attend import Mask
from internvl_jax.nn.param import constant, normal, param, zeros
from internvl_jax.nn.regularize import Randomness

TEXT = 1 << 20
"""Part of the step's randomness that QLLaMA draws from; the vision tower has the parts below."""


@dataclasses.dataclass(frozen=True)
class InternVLConfig:
    """Architecture of InternVL.

    Attributes:
        queries: number of learnable queries; 0 builds InternVL-C alone, the model of stage 1
            (no queries, no cross-attention, no second projector, no matching head).
        embed_dim: E, width of the contrastive space.
        logit_scale: initial value of the log temperature.
        logit_bias: initial value of the sigmoid loss' bias; None has no such parameter.
    """

    vision: VitConfig = VitConfig()
    qllama: LlamaConfig = LlamaConfig(cross_frequency=2, vision_width=3200, pad_id=0)
    queries: int = 96
    embed_dim: int = 768
    pool_heads: int = 16
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None

    def __post_init__(self):
        if self.queries and self.qllama.vision_width != self.vision.width:
            raise ValueError(
                f"qllama.vision_width={self.qllama.vision_width} must equal "
                f"vision.width={self.vision.width}: the queries cross-attend to those tokens."
            )
        if not self.queries and self.qllama.vision_width:
            raise ValueError(
                "queries=0 builds no cross-attention: set qllama.vision_width=0 as well."
            )

    def param_count(self) -> int:
        """Number of parameters."""
        D, E = self.qllama.width, self.embed_dim
        count = self.vision.param_count() + self.qllama.param_count()
        count += pool_param_count(self.vision.width, E) + D * E + 1
        count += self.logit_bias is not None
        if self.queries:
            count += self.queries * D + pool_param_count(D, E) + 2 * D + 2
        return count


class InternVL(nnx.Module):
    """Image and text towers aligned in one space; with queries, also matching and captions."""

    def __init__(self, cfg: InternVLConfig, compute: Compute, *, rngs: nnx.Rngs):
        D, E = cfg.qllama.width, cfg.embed_dim
        self.cfg, self.compute = cfg, compute
        self.vision = InternViT(cfg.vision, compute.of("vision"), rngs=rngs)
        self.qllama = Llama(cfg.qllama, compute.of("qllama"), rngs=rngs)
        self.clip_projector = AttentionPool(cfg.vision.width, cfg.pool_heads, E, rngs=rngs)
        self.text_projection = param(rngs, (D, E), ("embed", "contrastive"), normal(D**-0.5))
        self.logit_scale = param(rngs, (), (), constant(cfg.logit_scale))
        bias = cfg.logit_bias
        self.logit_bias = None if bias is None else param(rngs, (), (), constant(bias))
        if not cfg.queries:
            self.query_tokens = None
        else:
            self.query_tokens = param(rngs, (cfg.queries, D), (None, "embed"), normal(0.02))
            self.clip_projector2 = AttentionPool(D, cfg.pool_heads, E, rngs=rngs)
            self.itm_head = param(rngs, (D, 2), ("embed", None), normal(0.02))
            self.itm_bias = param(rngs, (2,), (None,), zeros)

    def image_tokens(
        self, images: jax.Array, *, keep: int | None = None, random: Randomness | None = None
    ) -> jax.Array:
        """Normalised images [B, S, S, 3] -> [B, P, Dv]."""
        return self.vision(images, keep=keep, random=random).tokens

    def text_embedding(
        self, text: jax.Array, text_mask: jax.Array, *, random: Randomness | None = None
    ) -> jax.Array:
        """The EOS row of the causal text pass, projected; ids and mask [B, T] -> float32 [B, E]."""
        T = text.shape[1]
        positions = jnp.broadcast_to(jnp.arange(T), text.shape)
        random = None if random is None else random.fold(TEXT)
        hidden = self.qllama(
            self.qllama.embed(text), positions, causal_mask(text_mask), random=random
        ).hidden
        return self.project_text(hidden, text_mask)

    def project_text(self, hidden: jax.Array, text_mask: jax.Array) -> jax.Array:
        """The last real row of right-padded text states, projected; [B, T, D] -> float32 [B, E]."""
        last = jnp.maximum(jnp.sum(text_mask.astype(jnp.int32), axis=1) - 1, 0)
        eos = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        kernel = self.text_projection[...].astype(eos.dtype)
        return jnp.einsum("BD,DE->BE", eos, kernel, preferred_element_type=jnp.float32)

    def query_inputs(self, rows: int) -> jax.Array:
        """The query tokens, repeated: [rows, Q, D]."""
        if self.query_tokens is None:
            raise ValueError("This model has no queries (queries=0): it is InternVL-C of stage 1.")
        tokens = self.query_tokens[...].astype(self.compute.jnp_dtype)
        return jnp.broadcast_to(tokens, (rows, *tokens.shape))

    def query_states(self, vision: jax.Array) -> jax.Array:
        """Queries alone, reading the image: [B, P, Dv] -> [B, Q, D] after the final norm."""
        x = self.query_inputs(vision.shape[0])
        Q = x.shape[1]
        positions = jnp.broadcast_to(jnp.arange(Q), x.shape[:2])
        return self.qllama(x, positions, Mask(), vision=vision, queries=Q).hidden

    def fused(
        self,
        vision: jax.Array,
        text: jax.Array,
        mask: jax.Array,
        *,
        collect: bool = False,
        random: Randomness | None = None,
    ) -> LlamaOutput:
        """One pass over rows [queries][text].

        Args:
            vision: [B, P, Dv].
            text: ids [R, T], R/B consecutive rows per image.
            mask: bool [R, Q + T, Q + T] of `models.qllama.query_text_mask`.
            collect: return every layer's output too.
            random: of the B images, turns the adapters' dropout on.
        """
        if random is not None:
            random = random.rows(text.shape[0] // vision.shape[0]).fold(TEXT)
        queries = self.query_inputs(text.shape[0])
        x = jnp.concatenate([queries, self.qllama.embed(text)], axis=1)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.qllama(
            x,
            positions,
            mask,
            vision=vision,
            queries=queries.shape[1],
            collect=collect,
            random=random,
        )

    def match_logits(self, query_rows: jax.Array) -> jax.Array:
        """Per-query matching logits [B, Q, D] -> float32 [B, Q, 2]; class 1 is a match."""
        kernel = self.itm_head[...].astype(query_rows.dtype)
        y = jnp.einsum("BQD,DC->BQC", query_rows, kernel, preferred_element_type=jnp.float32)
        return y + self.itm_bias[...].astype(jnp.float32)

    def matching_score(self, vision: jax.Array, text: jax.Array, text_mask: jax.Array) -> jax.Array:
        """Image-text matching logits, averaged over the queries: float32 [B, 2]."""
        mask = query_text_mask(self.cfg.queries, text_mask, "itm")
        hidden = self.fused(vision, text, mask).hidden
        return jnp.mean(self.match_logits(hidden[:, : self.cfg.queries]), axis=1)

    def image_embedding(self, vision: jax.Array, mode: str) -> jax.Array:
        """Image feature of InternVL-C (``"C"``) or the ensemble of InternVL-G (``"G"``).

        G is the sum of two unit vectors, so its norm is not one; the text side is the same in both.

        Args:
            vision: [B, P, Dv] image tokens.
            mode: ``"C"`` or ``"G"``.

        Returns:
            float32 [B, E], not normalised.
        """
        pooled = self.clip_projector(vision)
        if mode == "C":
            return pooled
        if mode == "G":
            return unit(pooled) + unit(self.clip_projector2(self.query_states(vision)))
        raise ValueError(f"Unknown mode {mode!r}: use 'C' (contrastive) or 'G' (generative).")

    def __call__(
        self, images: jax.Array, text: jax.Array, text_mask: jax.Array, mode: str
    ) -> jax.Array:
        """Similarity logits: normalised images [B, S, S, 3], ids [M, T] -> float32 [B, M]."""
        image = unit(self.image_embedding(self.image_tokens(images), mode))
        caption = unit(self.text_embedding(text, text_mask))
        return jnp.exp(self.logit_scale[...]) * (image @ caption.T)


def unit(x: jax.Array) -> jax.Array:
    """Rows of length one, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
