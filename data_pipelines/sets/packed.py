"""Several conversations a row, so that few of a row's tokens are padding.

Which ones share a row follows from their lengths, measured once for a tokenizer and kept beside the
corpus: ``python -m data_pipelines.build lengths FOLDER --tokenizer …``. A row is a unit, so that an
epoch still meets every conversation once, at any step, on any number of hosts.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.examples.finetune import FinetuneBuilder
from data_pipelines.sample import BadRecordError, Sample
from data_pipelines.sets.corpus import CorpusSet
from data_pipelines.text import Tokenizer

WINDOW = 4096
"""Conversations that are packed together: more fill rows no better."""


class PackedSet:
    """A unit is a row of conversations of a corpus; those that cannot be used are in none."""

    def __init__(self, corpus: CorpusSet, lengths: np.ndarray, config: DataConfig):
        """Packs a corpus; `open` is the usual way here.

        Args:
            corpus: of conversations.
            lengths: what `measure` returns.
            config: the data settings.

        Raises:
            ValueError: if no conversation is left.
        """
        self._corpus = corpus
        self._order, self._starts = pack(
            lengths[:, 0] + config.visual_tokens * lengths[:, 1],
            lengths[:, 1],
            room=config.text_length,
            slots=config.image_slots,
        )
        if len(self._starts) < 2:
            raise ValueError(f"{corpus.corpus.folder} has no conversation that can be used.")
        self.ends = np.asarray([len(self)])
        rows = hashlib.sha256(self._order.tobytes() + self._starts.tobytes()).hexdigest()
        self.records, self.digest = corpus.records, f"{corpus.digest}/packed/{rows}"

    @classmethod
    def open(cls, corpus: CorpusSet, config: DataConfig, tokenizer: Tokenizer) -> PackedSet:
        """Reads the lengths beside a corpus and packs it.

        Args:
            corpus: of conversations.
            config: the data settings.
            tokenizer: of the model that is trained.

        Returns:
            The set.

        Raises:
            ValueError: if it holds pairs, or the lengths were not measured for this tokenizer,
                template and corpus.
        """
        from data_pipelines.sources import storage

        folder = corpus.corpus.folder
        if corpus.corpus.kind != "conversations":
            raise ValueError(f"data.pack packs conversations, but {folder} holds pairs.")
        name = lengths_file(corpus, config.template, tokenizer)
        try:
            data = storage.read(storage.join(folder, name))
        except FileNotFoundError as error:
            raise ValueError(
                f"data.pack needs {folder}/{name}; run python -m data_pipelines.build lengths "
                f"{folder} --tokenizer {tokenizer.path} --template {config.template}."
            ) from error
        return cls(corpus, np.load(io.BytesIO(data), allow_pickle=False), config)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def draw(self, unit: int, rng: np.random.Generator) -> tuple[int, Sequence[Sample]]:
        """The conversations of a row.

        Args:
            unit: the row's number.
            rng: source of randomness.

        Returns:
            The number of its first record, and the samples.

        Raises:
            BadRecordError: if one of them cannot be used.
        """
        records = self._order[self._starts[unit] : self._starts[unit + 1]]
        samples = [self._corpus.draw(int(record), rng)[1][0] for record in records]
        return int(records[0]), samples

    def close(self) -> None:
        """Closes the corpus' open files; a later draw opens them again."""
        self._corpus.close()


def lengths_file(corpus: CorpusSet, template: str, tokenizer: Tokenizer) -> str:
    """The name of the file of lengths; it changes with all they depend on.

    Args:
        corpus: the corpus.
        template: of conversations.
        tokenizer: of the model.

    Returns:
        The file's name, beside the manifest.
    """
    model = hashlib.sha256(pathlib.Path(tokenizer.path).read_bytes()).hexdigest()
    key = hashlib.sha256(f"{corpus.digest} {template} {model}".encode()).hexdigest()
    return f"lengths-{key[:16]}.npy"


def measure(
    corpus: CorpusSet,
    config: DataConfig,
    tokenizer: Tokenizer,
    report: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Measures every conversation.

    Args:
        corpus: the corpus.
        config: its template is used.
        tokenizer: of the model.
        report: is told how many are done.

    Returns:
        [N,2] int32, tokens without the visual ones and pictures; zero tokens where the record
        cannot be used.
    """
    builder = FinetuneBuilder(config, tokenizer)
    lengths = np.zeros((len(corpus), 2), np.int32)
    rng = np.random.default_rng(0)
    for record in range(len(corpus)):
        try:
            (sample,) = corpus.draw(record, rng)[1]
            ids, _ = builder.fitting(sample, 1 << 30)
        except BadRecordError:
            continue
        pictures = len(sample.images)
        lengths[record] = len(ids) - pictures * config.visual_tokens, pictures
        report(record + 1)
    return lengths


def pack(
    tokens: np.ndarray, pictures: np.ndarray, *, room: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts conversations into rows: best fit, the longest first, in windows of a random order.

    Args:
        tokens: [N] of each; 0 is left out, more than ``room`` has a row to itself.
        pictures: [N] of each; more than ``slots`` is left out.
        room: tokens of a row.
        slots: pictures of a row.

    Returns:
        Record numbers row after row, and [rows + 1] where each begins.
    """
    usable = np.flatnonzero((tokens > 0) & (pictures <= slots))
    usable = np.random.default_rng(0).permutation(usable)
    rows: list[list[int]] = []
    for start in range(0, len(usable), WINDOW):
        window = usable[start : start + WINDOW]
        free: list[tuple[int, int, int]] = []  # (tokens left, row, slots left), ascending
        for record in window[np.argsort(-tokens[window], kind="stable")].tolist():
            need, seen = int(tokens[record]), int(pictures[record])
            at = bisect.bisect_left(free, (need, -1, -1))
            while at < len(free) and free[at][2] < seen:
                at += 1
            if at < len(free):
                left, row, spare = free.pop(at)
                rows[row].append(record)
            else:
                left, row, spare = max(room, need), len(rows), slots
                rows.append([record])
            if left > need:
                bisect.insort(free, (left - need, row, spare - seen))
    order = np.asarray([record for row in rows for record in row], np.int64)
    return order, np.cumsum([0, *map(len, rows)])
