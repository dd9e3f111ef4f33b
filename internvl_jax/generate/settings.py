"""How new tokens are chosen."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """Search settings, with the meaning they have in transformers 4.37.2.

    The numbers that only enter the arithmetic (lengths' penalty, temperature, ids ...) may change
    between calls without a new compilation.

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
        bos_id: where set, put in front of every returned row, as transformers does when it is
            prompted with embeddings; the model never sees it.
        count_seed: divide by one token more where a beam is still open at the length limit, as
            transformers 4.32 did (it counted the BOS put in front).
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
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: use do_sample=False instead of 0.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}: use top_k >= 0 and 0 < top_p <= 1."
            )
