"""From a prompt to new tokens: settings, the static cache, greedy search and sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import Decoder, Slots


@dataclasses.dataclass(frozen=True)
class Settings:
    """Search settings, with the meaning they have in transformers 4.37.2.

    Attributes:
        max_new_tokens: T, length of the returned rows.
        min_new_tokens: no EOS before so many tokens.
        num_beams: width of the beam search; 1 is greedy search or sampling.
        length_penalty: a hypothesis scores sum(log p) / length ** length_penalty.
        early_stopping: True stops an example as soon as `num_beams` hypotheses have ended, False
            when the best open one cannot win at its present length, ``"never"`` when it cannot win
            at any length.
        do_sample: draw tokens instead of taking the most likely one.
        temperature: divides the logits before sampling.
        top_k: sample among the k most likely tokens; 0 for all of them.
        top_p: sample among the most likely tokens that together reach this probability.
        eos_id: ends a row.
        pad_id: fills rows after their end.
        bos_id: where set, put in front of every returned row; the model never sees it.
        count_seed: divide by one token more where a beam is still open at the length limit, as
            transformers 4.32 did.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_id: int = 2
    pad_id: int = 0
    bos_id: int | None = None
    count_seed: bool = False

    def __post_init__(self):
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens < 1:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} and max_new_tokens={self.max_new_tokens} "
                "leave no length to generate: use 0 <= min <= max and max >= 1."
            )
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams}: use 1 (greedy, sampling) or more.")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: use True, False or 'never'.")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample with num_beams={self.num_beams}: sample with num_beams=1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: use do_sample=False instead of 0.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}: use top_k >= 0 and 0 < top_p <= 1."
            )


class Start(NamedTuple):
    """A prompt the decoder has read.

    Attributes:
        logits: float32 [B, V] for the first new token.
        slots: every layer's keys and values [B, K, P, H] of the prompt.
        mask: bool [B, P], False on (left) padding.
    """

    logits: Tensor
    slots: list[Slots]
    mask: Tensor


class Generated(NamedTuple):
    """What a search returns.

    Attributes:
        ids: int64 [B, T], the new tokens with their EOS, then padding; one column more, in front,
            where `Settings.bos_id` is set.
        lengths: int64 [B], new tokens with their EOS.
        scores: float32 [B], sum(log p) / length ** length_penalty under the unfiltered model.
        logits: float32 [T, B, V] that each token was chosen from (greedy and sampling, where asked
            for): EOS at -inf before `min_new_tokens`.
    """

    ids: Tensor
    lengths: Tensor
    scores: Tensor
    logits: Tensor | None = None


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch that ends together.

    Args:
        rows: B prompts of at least one id.
        pad_id: fills the front.
        multiple: the width is rounded up to a multiple of it.

    Returns:
        ids int64 [B, T] and mask bool [B, T].
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), width), pad_id)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) >= width - lengths[:, None]


def positions_of(mask: Tensor) -> Tensor:
    """Positions that skip padding in front, which gets 1; bool [B, T] -> int64 [B, T]."""
    return (mask.cumsum(dim=1) - 1).masked_fill(~mask, 1)


def start(
    llm: Decoder,
    x: Tensor,
    mask: Tensor,
    rule: Tensor | None = None,
    *,
    vision: Tensor | None = None,
    queries: int = 0,
) -> Start:
    """Reads a prompt.

    Args:
        llm: the decoder.
        x: embeddings [B, P, D], left-padded.
        mask: bool [B, P], False on padding.
        rule: bool [P, P], which positions see which; causal by default.
        vision, queries: see `Decoder.forward`.
    """
    B, P = mask.shape
    slots = empty_slots(llm, B, P, like=x)
    at = torch.arange(P, device=x.device)
    causal = rule is None and bool(mask.all())
    allowed = None
    if not causal:
        rule = torch.ones(P, P, dtype=torch.bool, device=x.device).tril() if rule is None else rule
        # Padding sees itself: a softmax over nothing is no number.
        own = torch.eye(P, dtype=torch.bool, device=x.device)
        allowed = ((rule & mask[:, None]) | own)[:, None]
    hidden = llm(
        x,
        positions_of(mask),
        allowed,
        causal=causal,
        vision=vision,
        queries=queries,
        cache=slots,
        at=at,
    )
    return Start(llm.logits(hidden[:, -1]), slots, mask)


def empty_slots(llm: Decoder, rows: int, capacity: int, *, like: Tensor) -> list[Slots]:
    """Room for keys and values: [rows, K, capacity, H] of anything, twice per layer."""
    shape = (rows, llm.cfg.kv_heads, capacity, llm.cfg.head_dim)
    return [(like.new_empty(shape), like.new_empty(shape)) for _ in range(llm.cfg.depth)]


class Cache:
    """Keys and values of fixed capacity; all rows fill the same slot at the same time.

    Attributes:
        slots: every layer's keys and values, [R, K, S, H] each.
        mask: bool [R, S], True where a slot holds a token.
        position: int64 [R], position of each row's next token.
        filled: how many slots are taken.
    """

    def __init__(self, slots: list[Slots], begun: Start, copies: int):
        """Copies a prompt into `slots`, `copies` consecutive rows (beams) for each of its rows."""
        self.slots, self.prompt = slots, begun.mask.shape[1]
        self.filled = self.prompt
        for target, source in zip(slots, begun.slots):
            for t, s in zip(target, source):
                t[:, :, : self.prompt] = s.repeat_interleave(copies, dim=0)
        mask = begun.mask.repeat_interleave(copies, dim=0)
        self.position = mask.sum(dim=1)
        self.mask = F.pad(mask, (0, slots[0][0].shape[2] - self.prompt))
        self.numbers = torch.arange(self.mask.shape[1], device=mask.device)

    def take(self, rows: Tensor) -> None:
        """Continues other rows instead, each of the same prompt: only what is new is moved."""
        new = slice(self.prompt, self.filled)
        for slots in self.slots:
            for s in slots:
                s[:, :, new] = s[rows, :, new]


class Writer:
    """Continues prompts with one decoder.

    Compiled, it keeps its cache between calls and rounds its capacity up to a multiple of `ROOM`,
    so that few shapes occur; otherwise a step looks at the filled slots only.
    """

    ROOM = 256

    def __init__(self, llm: Decoder, compile: bool = False):
        self.llm, self.compiled = llm, compile
        self._step = llm.step
        self._kept: list[Slots] | None = None
        if compile:
            cuda = next(llm.parameters()).is_cuda
            mode = "reduce-overhead" if cuda else "default"
            self._step = torch.compile(llm.step, mode=mode, dynamic=False)

    def cache(self, begun: Start, room: int, copies: int = 1) -> Cache:
        """A cache that holds a prompt and has room for so many tokens more."""
        like = begun.slots[0][0]
        rows, capacity = len(begun.mask) * copies, begun.mask.shape[1] + room
        if not self.compiled:
            return Cache(empty_slots(self.llm, rows, capacity, like=like), begun, copies)
        capacity = -(-capacity // self.ROOM) * self.ROOM
        kept = self._kept
        if kept is None or kept[0][0].shape[0] != rows or kept[0][0].shape[2] != capacity:
            self._kept = kept = empty_slots(self.llm, rows, capacity, like=like)
            for slots in kept:
                for s in slots:
                    s.zero_()  # what is masked is multiplied by 0, so it must be a number
                    torch._dynamo.mark_static_address(s)
        return Cache(kept, begun, copies)

    def feed(self, token: Tensor, cache: Cache) -> Tensor:
        """Appends one token per row, [R]; float32 logits [R, V] of the next one."""
        at = cache.filled
        cache.mask[:, at] = True
        mask = cache.mask if self.compiled else cache.mask[:, : at + 1]
        slot = cache.numbers[at : at + 1]
        logits = self._step(token, cache.position, mask, cache.slots, slot)
        cache.position += 1
        cache.filled += 1
        return logits.clone() if self.compiled else logits  # a CUDA graph writes there again

    @torch.inference_mode()
    def __call__(
        self,
        begun: Start,
        settings: Settings,
        random: torch.Generator | None = None,
        *,
        logits: bool = False,
    ) -> Generated:
        """Searches.

        Args:
            begun: B prompts.
            settings: how.
            random: what samples are drawn from.
            logits: return the logits each token was chosen from; not with beams.
        """
        from .beam import search

        if settings.num_beams > 1:
            found = search(self, begun, settings)
        else:
            found = self._one_by_one(begun, settings, random, logits)
        if settings.bos_id is None:
            return found
        return found._replace(ids=F.pad(found.ids, (1, 0), value=settings.bos_id))

    def _one_by_one(
        self, begun: Start, settings: Settings, random: torch.Generator | None, keep: bool
    ) -> Generated:
        B, T = len(begun.mask), settings.max_new_tokens
        device = begun.logits.device
        ids = torch.full((B, T), settings.pad_id, device=device)
        lengths = torch.zeros(B, dtype=torch.int64, device=device)
        total = torch.zeros(B, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        cache, logits, kept = self.cache(begun, T - 1), begun.logits, []
        for step in range(T):
            allowed = forbid_eos(logits, step, settings)
            if settings.do_sample:
                p = filter_logits(allowed, settings).softmax(dim=-1)
                token = torch.multinomial(p, 1, generator=random)[:, 0]
            else:
                token = allowed.argmax(dim=-1)
            token = token.masked_fill(done, settings.pad_id)
            log_p = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]
            total += log_p.masked_fill(done, 0.0)
            lengths += ~done
            ids[:, step] = token
            done |= token == settings.eos_id
            if keep:
                kept.append(allowed)
            if step + 1 == T or finished(done, step):
                break
            logits = self.feed(token, cache)
        scores = total / lengths.float() ** settings.length_penalty
        return Generated(ids, lengths, scores, torch.stack(kept) if keep else None)


def finished(done: Tensor, step: int) -> bool:
    """Whether all rows are done; on a GPU, where to ask is to wait, asked every eighth step."""
    return (not done.is_cuda or step % 8 == 7) and bool(done.all())


def forbid_eos(scores: Tensor, chosen: int, settings: Settings) -> Tensor:
    """EOS at -inf while fewer than `min_new_tokens` have been chosen; [..., V]."""
    if chosen >= settings.min_new_tokens or not 0 <= settings.eos_id < scores.shape[-1]:
        return scores
    scores = scores.clone()
    scores[..., settings.eos_id] = -torch.inf
    return scores


def filter_logits(logits: Tensor, settings: Settings) -> Tensor:
    """Logits to sample from: temperature, top-k, then top-p among what that left.

    Ties with the last kept token are kept; [B, V], -inf where a token must not be drawn.
    """
    # Divided by less, logits overflow, and on a GPU drawing from no numbers ends the process' work.
    logits = logits / max(settings.temperature, 1e-6)
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1:
        ranked = logits.sort(dim=-1, descending=True).values
        p = ranked.softmax(dim=-1)
        kept = (p.cumsum(dim=-1) - p < settings.top_p) & (ranked > -torch.inf)
        floor = ranked.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits
