"""Stage 1's rules: the six signals of the paper's appendix (https://arxiv.org/abs/2312.14238).

Every rule is a function of columns that says which rows to drop. Null is no opinion: it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from data_pipelines.clean.config import Signals
from data_pipelines.metadata.kernels import pc

Rule = tuple[str, tuple[str, ...], Callable[[Any], Any]]
"""(reason, columns it reads, function of a batch -> Arrow bool array [n]: drop, null keeps)."""


def rules(settings: Signals) -> Iterator[Rule]:
    """The rules that are switched on, the cheapest first.

    Args:
        settings: thresholds; None switches a rule off.

    Yields:
        See `Rule`.
    """
    s = settings

    def least(field: str, value: float) -> Rule:
        # Compared in float32, as the column is: 0.3 is kept where 0.3 is asked for.
        return field, (field,), lambda b: pc.less(b.column(field), pa.scalar(value, pa.float32()))

    def most(reason: str, field: str, value: float) -> Rule:
        limit = pa.scalar(value, pa.float32())
        return reason, (field,), lambda b: pc.greater(b.column(field), limit)

    if s.similarity is not None:
        yield least("similarity", s.similarity)
    if s.watermark is not None:
        yield most("watermark", "pwatermark", s.watermark)
    if s.unsafe is not None:
        yield most("unsafe", "punsafe", s.unsafe)
    if s.aesthetic is not None:
        yield least("aesthetic", s.aesthetic)
    if s.side is not None:
        side = pa.scalar(s.side, pa.int32())
        yield "resolution", ("width", "height"), lambda b: pc.less(_shorter(b), side)
    if s.aspect is not None:
        yield "aspect", ("width", "height"), lambda b: _longer_than(b, s.aspect)
    if s.least_chars is not None or s.most_chars is not None:
        low, high = s.least_chars or 0, s.most_chars or 2**31 - 1
        yield "caption_length", ("caption",), lambda b: _outside(b.column("caption"), low, high)


def _shorter(batch: Any) -> Any:
    return pc.min_element_wise(batch.column("width"), batch.column("height"), skip_nulls=True)


def _longer_than(batch: Any, aspect: float | None) -> Any:
    longer = pc.max_element_wise(batch.column("width"), batch.column("height"), skip_nulls=False)
    shorter = pc.min_element_wise(batch.column("width"), batch.column("height"), skip_nulls=False)
    limit = pc.multiply(pc.cast(shorter, pa.float64()), pa.scalar(aspect, pa.float64()))
    return pc.greater(pc.cast(longer, pa.float64()), limit)


def _outside(captions: Any, low: int, high: int) -> Any:
    length = pc.utf8_length(pc.utf8_trim_whitespace(captions))
    return pc.or_(pc.less(length, low), pc.greater(length, high))
