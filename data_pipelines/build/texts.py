"""What a corpus' texts are good for besides training: a tokenizer, and the lengths of rows."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import numpy as np

from data_pipelines.build.work import Progress
from data_pipelines.config import DataConfig
from data_pipelines.datasets import TOKENIZER_FILE
from data_pipelines.manifest import Corpus, open_corpus
from data_pipelines.sample import BadRecordError
from data_pipelines.sets.corpus import CorpusSet
from data_pipelines.sets.packed import lengths_file, measure
from data_pipelines.sources import storage
from data_pipelines.text import Tokenizer, train

TEXTS = 1_000_000


def train_tokenizer(folder: str, vocab_size: int) -> Tokenizer:
    """Trains a tokenizer on a corpus, for models that start from nothing.

    Args:
        folder: of the corpus, on a local disk; the tokenizer is written into it, where training
            finds it.
        vocab_size: most ids.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if the texts are too few for the vocabulary.
    """
    if storage.is_remote(folder):
        raise ValueError(f"A tokenizer is written to a local disk, and {folder} is none.")
    corpus = open_corpus(folder)
    texts = itertools.islice(_texts(corpus), TEXTS)
    return train(texts, storage.join(folder, TOKENIZER_FILE), vocab_size=vocab_size)


def _texts(corpus: Corpus) -> Iterator[str]:
    """Texts of records that lie evenly over the corpus."""
    progress = Progress("texts", "records")
    step = max(1, len(corpus) // TEXTS)
    for record in range(0, len(corpus), step):
        try:
            sample = corpus.sample(record)
        except BadRecordError:
            continue
        yield from (caption.text for caption in sample.captions)
        yield from (turn.value for turn in sample.turns)
        progress.update(record / len(corpus), record // step)


def write_lengths(folder: str, tokenizer_path: str, template: str) -> tuple[str, np.ndarray]:
    """Measures conversations, so that `sets.packed` can put several into a row.

    Args:
        folder: of a corpus of conversations, local or a URL; the lengths are written beside its
            manifest. It may hold those for several tokenizers and templates.
        tokenizer_path: the model's tokenizer.
        template: of conversations.

    Returns:
        The path of the file, and what it holds (`sets.packed.measure`).

    Raises:
        FileNotFoundError: if there is no manifest, or no tokenizer.
        ValueError: if the tokenizer is none.
    """
    tokenizer = Tokenizer(tokenizer_path)
    corpus = CorpusSet.open(folder, "finetune", "train")
    config = DataConfig(dataset=folder, template=template, text_length=1 << 20)
    progress = Progress("lengths", "records")
    report = lambda done: progress.update(done / len(corpus), done)
    lengths = measure(corpus, config, tokenizer, report)
    path, data = storage.join(folder, lengths_file(corpus, template, tokenizer)), io.BytesIO()
    np.save(data, lengths)
    storage.write(path, data.getvalue())
    return path, lengths
