"""InternVL-C and InternVL-G (https://arxiv.org/abs/2312.14238, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import InternVLConfig
from .decoder import Decoder
from .generate import Start, start
from .vit import InternViT


class PoolAttention(nn.Module):
    """One query row reads the tokens; its k_bias shifts all keys alike and is kept as stored."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.empty(width)) for _ in range(3))
        self.proj = nn.Linear(width, out)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = F.linear(query, self.q.weight, self.q_bias)
        k = F.linear(keys, self.k.weight, self.k_bias)
        v = F.linear(values, self.v.weight, self.v_bias)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))[:, 0].float()


class AttentionPool(nn.Module):
    """The ``clip_projector``: the mean of all tokens reads the tokens; [B, P, D] -> [B, E]."""

    def __init__(self, width: int, heads: int, out: int):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        self.cross_attn = PoolAttention(width, heads, out)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.float().mean(dim=1, keepdim=True).to(tokens.dtype)
        return self.cross_attn(self.norm1_q(mean), self.norm1_k(tokens), self.norm1_v(tokens))


def unit(x: Tensor) -> Tensor:
    """Rows of length one, in float32."""
    return F.normalize(x.float(), dim=-1)


class InternVL(nn.Module):
    """Image and text towers aligned in one space; with queries, also matching and captions."""

    def __init__(self, cfg: InternVLConfig):
        super().__init__()
        D, E = cfg.qllama.width, cfg.embed_dim
        self.cfg = cfg
        self.vision_model = InternViT(cfg.vision)
        self.qllama = Decoder(cfg.qllama)
        self.clip_projector = AttentionPool(cfg.vision.width, cfg.pool_heads, E)
        self.text_projection = nn.Parameter(torch.empty(D, E))
        self.logit_scale = nn.Parameter(torch.empty(()))
        if cfg.queries:
            self.query_tokens = nn.Parameter(torch.empty(1, cfg.queries, D))
            self.clip_projector2 = AttentionPool(D, cfg.pool_heads, E)
            self.itm_head = nn.Linear(D, 2)

    def image_tokens(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, S, S, 3] -> [B, P, Dv]."""
        return self.vision_model(images)[0]

    def query_states(self, vision: Tensor) -> Tensor:
        """Queries alone, reading the picture: [B, P, Dv] -> [B, Q, D] after the final norm."""
        x = self.query_tokens.expand(len(vision), -1, -1)
        return self.qllama(x, vision=vision, queries=x.shape[1])

    def image_embedding(self, vision: Tensor, mode: str = "C") -> Tensor:
        """Feature of InternVL-C, or InternVL-G's sum of two unit vectors; float32 [B, E].

        Args:
            vision: [B, P, Dv] image tokens.
            mode: ``"C"`` or ``"G"``.
        """
        pooled = self.clip_projector(vision)
        if mode == "C":
            return pooled
        return unit(pooled) + unit(self.clip_projector2(self.query_states(vision)))

    def text_embedding(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The EOS row of the causal text pass, projected.

        Args:
            ids: [B, T], right-padded: padding stands after the row that is read, so no mask.
            lengths: [B] tokens of each row.

        Returns:
            float32 [B, E], not normalised.
        """
        hidden = self.qllama(self.qllama.embed(ids), causal=True)
        eos = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        return (eos @ self.text_projection).float()

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits of embeddings [B, E] and [M, E]: float32 [B, M]."""
        return self.logit_scale.float().exp() * (unit(image) @ unit(text).T)

    def match_logits(self, vision: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Matching logits, averaged over the queries; class 1 is a match.

        Args:
            vision: [B, P, Dv].
            ids: [R, T], R/B consecutive rows per picture, right-padded.
            mask: bool [R, T], False on padding.

        Returns:
            float32 [R, 2].
        """
        Q = self.cfg.queries
        x = torch.cat([self.query_tokens.expand(len(ids), -1, -1), self.qllama.embed(ids)], dim=1)
        seen = F.pad(mask, (Q, 0), value=True)[:, None, None]
        rows = self.qllama(x, mask=seen, vision=vision, queries=Q)[:, :Q]
        return self.itm_head(rows).float().mean(dim=1)

    def read(self, images: Tensor, ids: Tensor, mask: Tensor) -> Start:
        """Reads [queries][prompt], the queries looking at the picture: where a caption starts.

        Args:
            images: [B, S, S, 3], normalised.
            ids: prompts [B, T] with BOS and without EOS, left-padded.
            mask: bool [B, T].
        """
        Q, (B, T) = self.cfg.queries, ids.shape
        vision = self.image_tokens(images)
        x = torch.cat([self.query_tokens.expand(B, -1, -1), self.qllama.embed(ids)], dim=1)
        whole = F.pad(mask, (Q, 0), value=True)
        # Queries see one another, not the prompt; a prompt's token all queries and what was before.
        rule = torch.ones(Q + T, Q + T, dtype=torch.bool, device=ids.device).tril()
        rule[:Q, :Q] = True
        return start(self.qllama, x, whole, rule, vision=vision, queries=Q)
