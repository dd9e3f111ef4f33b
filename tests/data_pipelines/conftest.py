"""The shapes' tokenizer, trained once."""

from __future__ import annotations

import pathlib

import pytest

from data_pipelines import text
from data_pipelines.corpus import make_corpus
from data_pipelines.shapes.draw import make_concepts


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    corpus = make_corpus([concept for concept in make_concepts() if not concept.unseen])
    text.train(corpus, path, vocab_size=700)
    return path


@pytest.fixture
def tokenizer(tokenizer_path) -> text.Tokenizer:
    return text.Tokenizer(tokenizer_path)
