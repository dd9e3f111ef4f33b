"""Beam search with the outcome of transformers 4.37.2, its walk over candidates written as sorts.

Per example K beams are open; K x V continuations compete. Of the best 2K, an EOS among the first K
closes its beam into a hypothesis, an EOS further down is dropped, and the first K others are the
next open beams (there are always that many: each beam offers one EOS). The K best closed
hypotheses are kept; when an example may stop is `Settings.early_stopping`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .generate import Generated, Settings, Start, Writer, finished, forbid_eos


class Hypotheses(NamedTuple):
    """Closed beams: ids [B, K, T], lengths [B, K] with EOS, scores [B, K] (-inf: there is none)."""

    ids: Tensor
    lengths: Tensor
    scores: Tensor


class Beams(NamedTuple):
    """Open beams, best first, and what has been closed.

    Attributes:
        ids: int64 [B, K, T].
        log_p: float32 [B, K], their sum.
        parent: int64 [B, K], which beam of the step before each one continues.
        closed: the best hypotheses so far, best first.
        done: bool [B], nothing open can win any more.
    """

    ids: Tensor
    log_p: Tensor
    parent: Tensor
    closed: Hypotheses
    done: Tensor


def search(writer: Writer, begun: Start, settings: Settings) -> Generated:
    """The best hypothesis of every prompt; K = num_beams, T = max_new_tokens."""
    B, K, T = len(begun.mask), settings.num_beams, settings.max_new_tokens
    device = begun.logits.device
    ids = torch.full((B, K, T), settings.pad_id, device=device)
    count = torch.zeros((B, K), dtype=torch.int64, device=device)
    log_p = torch.zeros((B, K), device=device)
    # All beams begin alike: only the first one counts, or all would choose the same token.
    log_p[:, 1:] = -1e9
    closed = Hypotheses(ids, count, torch.full((B, K), -torch.inf, device=device))
    beams = Beams(ids, log_p, count, closed, torch.zeros(B, dtype=torch.bool, device=device))
    first = torch.arange(B, device=device)[:, None] * K  # row of each example's beam 0

    cache = writer.cache(begun, T - 1, copies=K)
    logits = begun.logits[:, None].expand(-1, K, -1)
    for step in range(T):
        beams = advance(beams, logits, step, settings)
        if step + 1 == T or finished(beams.done, step):
            break
        cache.take((first + beams.parent).flatten())
        logits = writer.feed(beams.ids[:, :, step].flatten(), cache).unflatten(0, (B, K))

    # Beams still open at the limit compete as they are; a finished example's do not.
    scores = beams.log_p / divisor(T + settings.count_seed, settings)
    scores = scores.masked_fill(beams.done[:, None], -torch.inf)
    open_ones = Hypotheses(beams.ids, torch.full_like(count, T), scores)
    best = _best(beams.closed, open_ones, 1)
    return Generated(best.ids[:, 0], best.lengths[:, 0], best.scores[:, 0])


def advance(beams: Beams, logits: Tensor, step: int, settings: Settings) -> Beams:
    """One step of the search: float32 logits [B, K, V] of the open beams -> the next ones."""
    B, K, V = logits.shape
    log_p = forbid_eos(logits.log_softmax(dim=-1), step, settings) + beams.log_p[..., None]
    log_p, index = log_p.reshape(B, K * V).topk(2 * K, dim=1)
    parent, token = index // V, index % V
    ends = token == settings.eos_id
    ids = _take(beams.ids, parent)
    ids[:, :, step] = token

    length = divisor(step + 1, settings)
    closes = ends[:, :K] & ~beams.done[:, None]
    scores = (log_p[:, :K] / length).masked_fill(~closes, -torch.inf)
    lengths = torch.full_like(parent[:, :K], step + 1)
    closed = _best(beams.closed, Hypotheses(ids[:, :K], lengths, scores), K)

    full = closed.scores[:, -1] > -torch.inf
    if settings.early_stopping is not True:
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = divisor(settings.max_new_tokens + settings.count_seed, settings)
        full &= closed.scores[:, -1] >= log_p[:, 0] / length

    follow = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, :K]
    return Beams(
        _take(ids, follow), _take(log_p, follow), _take(parent, follow), closed, beams.done | full
    )


def divisor(tokens: int, settings: Settings) -> float:
    """length ** length_penalty."""
    return tokens**settings.length_penalty


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Entries of axis 1 by index [B, K]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _best(old: Hypotheses, new: Hypotheses, keep: int) -> Hypotheses:
    """The best `keep` of both, the older first where they tie."""
    both = Hypotheses(*(torch.cat(pair, dim=1) for pair in zip(old, new)))
    index = both.scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return Hypotheses(*(_take(x, index) for x in both))
