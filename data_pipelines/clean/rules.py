"""All rules of a source in order: a batch goes in, the reason of every row comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.clean import captions, decontaminate, language, signals
from data_pipelines.clean.config import CleanConfig
from data_pipelines.clean.signals import Rule
from data_pipelines.metadata.kernels import pc
from data_pipelines.metadata.keys import combine
from internvl_jax.config import ConfigError

KEPT = 0
REASONS = (
    "kept",
    # What can be of no use to anyone.
    *("malformed", "no_url", "no_caption", "download"),
    # Stage 1's signals.
    *("similarity", "watermark", "unsafe", "aesthetic", "resolution", "aspect", "caption_length"),
    # Stage 2's captions.
    *("caption_size", "placeholder", "incomplete", "code", "boilerplate", "offensive"),
    *("gibberish", "unreadable", "repetition", "language"),
    # What other rows or sets hold.
    *("contaminated_picture", "contaminated_caption", "listed"),
    *("duplicate_url", "duplicate_url_caption", "duplicate_caption", "duplicate_sha256"),
    *("duplicate_phash", "near_phash", "caption_repeated"),
)
"""The code of a reason is its place here. A row has the first reason that applies."""
CODES = {reason: code for code, reason in enumerate(REASONS)}


def _presence() -> Iterator[Rule]:
    yield "no_url", ("url",), lambda b: _empty(b.column("url"))
    yield "no_caption", ("caption",), lambda b: _empty(b.column("caption"))
    yield "download", ("status",), lambda b: pc.not_equal(b.column("status"), "success")


def _empty(texts: Any) -> Any:
    return pc.fill_null(pc.equal(pc.binary_length(texts), 0), True)


def uid_keys(uids: Any) -> np.ndarray:
    """[n] uint64 of an Arrow array [n] of 16 bytes without nulls."""
    words = np.frombuffer(uids.buffers()[1], ">u8").reshape(-1, 2)
    words = words[uids.offset : uids.offset + len(uids)].astype(np.uint64)
    return combine(words[:, 0], words[:, 1])


def _listed(config: CleanConfig) -> Iterator[Rule]:
    if not config.drop_uids:
        return
    keys = []
    for path in config.drop_uids:
        try:
            uids = np.load(path, allow_pickle=False)
            keys.append(combine(uids["f0"], uids["f1"]))
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(
                f"config.drop_uids {path} cannot be read ({error}): give a .npy file of uids as "
                "cleaning writes them."
            ) from error
    sorted_keys = np.unique(np.concatenate(keys))

    def listed(batch: Any) -> Any:
        wanted = uid_keys(batch.column("uid"))
        place = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
        return pa.array(sorted_keys[place] == wanted)

    if len(sorted_keys):
        yield "listed", ("uid",), listed


class Rules:
    """The rules of one source.

    Args:
        config: of the run.
        source: one of its sources.

    Attributes:
        fields: those of the schema that the rules read.
    """

    def __init__(self, config: CleanConfig, source: str):
        of_signals, of_captions = config.rules_of(source)
        self.rules: list[Rule] = [
            *_presence(),
            *signals.rules(of_signals),
            *captions.rules(of_captions),
            *language.rules(config.language),
            *decontaminate.rules(config.contamination),
            *_listed(config),
        ]
        self.fields = tuple(dict.fromkeys(f for _, fields, _ in self.rules for f in fields))

    def __call__(self, batch: Any) -> np.ndarray:
        """Codes of `REASONS`, [n] uint8, for an Arrow batch of n rows with `fields`."""
        reasons = np.zeros(batch.num_rows, np.uint8)
        rows = np.arange(batch.num_rows)
        for reason, _, rule in self.rules:
            dropped = pc.fill_null(rule(batch), False).to_numpy(zero_copy_only=False)
            reasons[rows[dropped & (reasons[rows] == KEPT)]] = CODES[reason]
            kept = reasons[rows] == KEPT
            # Later rules cost more: spare them what is gone already.
            if np.count_nonzero(kept) < 0.8 * len(rows):
                batch, rows = batch.filter(pa.array(kept)), rows[kept]
        return reasons
