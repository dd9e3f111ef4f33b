"""Tokenizers: round trips, truncation, pads, sizes, and the original's ids."""

from __future__ import annotations

import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import sentencepiece

from data_pipelines import text
from internvl_jax.batch import SUMMARIZE, caption_labels

CASES = json.loads(
    pathlib.Path(__file__).with_name("tokenizer_cases.json").read_text(encoding="utf-8")
)
TEXTS = (
    "red circle",
    "  two  spaces ",
    "红色圆形",
    "赤い円",
    "دائرة أحمر",
    "naïve 😀\nline",
    "1999",
)


@pytest.mark.parametrize("string", TEXTS)
def test_round_trip(tokenizer, string):
    ids, mask = tokenizer.encode(string, 80)
    assert ids[0] == tokenizer.bos_id and ids[mask][-1] == tokenizer.eos_id
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert tokenizer.decode(ids) == string


def test_empty_text_has_no_ids(tokenizer):
    assert tokenizer.ids("") == []
    assert tokenizer.row("", 8) == [1, 2]


def test_digits_are_split(tokenizer):
    assert len(tokenizer.ids("1999")) == 5  # the space before it, and four digits


def test_truncation_keeps_eos_last(tokenizer):
    whole = tokenizer.row("x" * 100, 500)
    ids, mask = tokenizer.encode("x" * 100, 10)
    assert mask.all() and ids.dtype == np.int32
    assert ids.tolist() == [*whole[:9], 2]


def test_prompt_is_tokenised_on_its_own_and_never_cut(tokenizer):
    prompt, caption = tokenizer.ids("English caption:"), tokenizer.ids("red circle")
    assert tokenizer.row("red circle", 80, prompt="English caption:") == [1, *prompt, *caption, 2]
    cut = tokenizer.row("red circle " * 9, len(prompt) + 4, prompt="English caption:")
    assert cut[: len(prompt) + 1] == [1, *prompt] and cut[-1] == 2
    with pytest.raises(ValueError, match="too short for the prompt"):
        tokenizer.row("red", len(prompt) + 2, prompt="English caption:")


def test_batch_rows_equal_single_rows(tokenizer):
    ids, mask = tokenizer.encode_batch(TEXTS, 12)
    assert ids.shape == mask.shape == (len(TEXTS), 12)
    for i, string in enumerate(TEXTS):
        np.testing.assert_array_equal(ids[i], tokenizer.encode(string, 12)[0])
    assert tokenizer.encode_batch([], 12)[0].shape == (0, 12)


def test_decode_leaves_out_what_is_no_text(tokenizer):
    ids = [1, *tokenizer.ids("red"), -200, -100, tokenizer.pad_id, 10**6, 2]
    assert tokenizer.decode(ids) == "red"


def test_special_pieces_in_a_text_stay_text(tokenizer):
    assert not {0, 1, 2, 3} & set(tokenizer.ids("</s> <s> [PAD]"))


def test_same_texts_give_the_same_file(tmp_path):
    corpus = ["red circle", "blue square", "红色圆形"] * 5
    for name in "ab":
        text.train(corpus, tmp_path / name, vocab_size=320)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_training_errors_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="no texts to train"):
        text.train([" "], tmp_path / "t")
    with pytest.raises(ValueError, match=r"vocabulary of 50 on 1 texts .* choose another"):
        text.train(["red"], tmp_path / "t", vocab_size=50)
    assert not list(tmp_path.iterdir())


def make_model(path: pathlib.Path, **options) -> pathlib.Path:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["red circle", "blue square"]),
            model_writer=file,
            model_type="bpe",
            vocab_size=290,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
    return path


def test_pad_is_the_files_own_piece_or_one_more(tmp_path):
    listed = make_model(tmp_path / "a", pad_id=-1, user_defined_symbols=["[PAD]"])
    assert text.Tokenizer(listed).pad_id == 3
    without = text.Tokenizer(make_model(tmp_path / "b", pad_id=-1))
    assert without.pad_id == without.vocab_size - 1
    pieces = without.pad_id
    # An embedding without a row for the extra pad: pads carry id 0, as in the original evaluation.
    assert text.Tokenizer(tmp_path / "b", vocab_size=pieces).pad_id == 0
    assert text.Tokenizer(tmp_path / "b", vocab_size=pieces + 1).pad_id == pieces


def test_wrong_files_are_refused(tmp_path, tokenizer_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        text.Tokenizer(tmp_path / "missing")
    (tmp_path / "json").write_text("{}")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        text.Tokenizer(tmp_path / "json")
    other = make_model(tmp_path / "other", unk_id=2, bos_id=0, eos_id=1)
    with pytest.raises(ValueError, match=r"unk, bos, eos = \(2, 0, 1\)"):
        text.Tokenizer(other)
    with pytest.raises(ValueError, match="vocabulary is 49954; use the model's own"):
        text.Tokenizer(tokenizer_path, vocab_size=49954)
    assert text.Tokenizer(tokenizer_path, vocab_size=tokenizer.vocab_size).pad_id == 3


def test_pickles(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.ids(TEXTS[0]) == tokenizer.ids(TEXTS[0]) and again.pad_id == tokenizer.pad_id


@pytest.mark.skipif(
    "INTERNVL_TOKENIZER" not in os.environ, reason="INTERNVL_TOKENIZER names no tokenizer.model"
)
def test_ids_equal_the_original():
    """With the Chinese-LLaMA-Alpaca tokenizer.model of InternVL-14B."""
    encoder = text.Tokenizer(os.environ["INTERNVL_TOKENIZER"], vocab_size=49954)
    facts = CASES["facts"]
    assert encoder.pad_id == facts["pad_id_in_files"]
    for case in CASES["clip_text_max_length80"]["cases"]:
        ids, mask = encoder.encode(SUMMARIZE + case["text"], 80)
        assert np.where(mask, ids, 0).tolist() == case["ids"], case["text"]
    for case in CASES["finetune_raw"]["cases"]:
        ids, mask = encoder.encode(case["text"], 80)
        assert ids.tolist() == case["ids"] and mask.sum() == case["mask_sum"], case["text"]
    for case in CASES["caption_prompt"]["cases"]:
        assert encoder.row(case["text"], 80, eos=False) == case["ids"], case["text"]
    for case in CASES["decode"]:
        assert encoder.decode(case["ids"]) == case["text"]
    example = CASES["itg_example"]
    ids, mask = encoder.encode(example["caption"], 80, prompt=example["prefix"])
    assert ids.tolist() == example["input_ids"]
    assert mask.astype(int).tolist() == example["attention_mask"]
    prompt = 1 + len(encoder.ids(example["prefix"]))
    assert caption_labels(ids, mask, prompt).tolist() == example["labels"]
