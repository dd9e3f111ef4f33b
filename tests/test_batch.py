"""Batches: shapes, templates and label masks against hand-written rows."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from internvl_jax import batch
from internvl_jax.batch import IGNORE, IMAGE_TOKEN, PLAIN, VICUNA_V1, Segment

WORDS: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """One id per word and per newline, from 10 on, in order of appearance."""
    words = text.replace("\n", " \n ").split(" ")
    return [WORDS.setdefault(word, 10 + len(WORDS)) for word in words if word]


def decode(ids) -> list[str]:
    names = {i: word for word, i in WORDS.items()} | {1: "<s>", 2: "</s>", IMAGE_TOKEN: "<v>"}
    return ["-" if i == IGNORE else names[int(i)] for i in ids]


def rows(template, turns, visual_tokens=2):
    segments = template.segments(turns)
    ids, labels = batch.tokenize(segments, encode, bos=1, eos=2, visual_tokens=visual_tokens)
    assert ids.dtype == labels.dtype == np.int32 and ids.shape == labels.shape
    return decode(ids), decode(labels)


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_vicuna_learns_the_answers_and_their_eos_only():
    ids, labels = rows(VICUNA_V1, turns("what is <image> this", "a cat", "really ?", "yes"))
    system = VICUNA_V1.system.split()
    assert ids == [
        "<s>", *system, "USER:", "<v>", "<v>", "\n", "what", "is", "this", "ASSISTANT:",
        "a", "cat", "</s>", "USER:", "really", "?", "ASSISTANT:", "yes", "</s>",
    ]  # fmt: skip
    hidden = 1 + len(system) + 8
    assert labels == ["-"] * hidden + ["a", "cat", "</s>", "-", "-", "-", "-", "yes", "</s>"]


def test_vicuna_text_is_the_published_string():
    segments = VICUNA_V1.segments(turns("<image>\nhi", "hello"))
    assert segments == [
        Segment(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
            "USER: <image>\nhi ASSISTANT:",
            learned=False,
        ),
        Segment("hello", learned=True, eos=True),
    ]


def test_plain_learns_the_caption_and_its_newline():
    ids, labels = rows(PLAIN, turns("<image>", "a cat"), visual_tokens=3)
    assert ids == ["<s>", "<v>", "<v>", "<v>", "a", "cat", "\n"]
    assert labels == ["-", "-", "-", "-", "a", "cat", "\n"]


def test_two_images_come_to_the_front_of_their_turn():
    (question,) = VICUNA_V1.segments(turns("compare <image> with <image>"))
    assert question.text.endswith("USER: <image>\n<image>\ncompare  with ASSISTANT:")


def test_an_open_answer_ends_the_prompt():
    asked = VICUNA_V1.segments(turns("one", "two", "three"))
    assert VICUNA_V1.segments(turns("one", "two", "three", None)) == asked
    assert asked[-1] == Segment("USER: three ASSISTANT:", learned=False)


def test_turns_must_alternate():
    with pytest.raises(ValueError, match=r"Turn 1 .* must alternate"):
        VICUNA_V1.segments([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}])


def test_caption_labels_equal_the_official_row():
    path = pathlib.Path(__file__).parent / "data_pipelines" / "tokenizer_cases.json"
    official = json.loads(path.read_text("utf-8"))["itg_example"]
    ids = np.asarray(official["input_ids"], np.int32)
    mask = np.asarray(official["attention_mask"], bool)
    prompt = 5  # BOS and the four ids of "English caption:"
    labels = batch.caption_labels(ids[None], mask[None], prompt)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels[0], official["labels"])


def test_pad_rows_cuts_and_pads():
    ids, mask = batch.pad_rows([[1, 5, 2], [1, 5, 6, 7, 2]], 4, fill=9)
    np.testing.assert_array_equal(ids, [[1, 5, 2, 9], [1, 5, 6, 7]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("language", "text text_mask labels"),
        ("contrastive", "image text text_mask"),
        (
            "generative",
            "image positive positive_mask negative negative_mask summarize summarize_mask "
            "text text_mask labels image_id",
        ),
        ("finetune", "image text segment labels"),
    ],
)
def test_spec_names_every_array(stage, names):
    spec = batch.spec(stage, batch=4, text_length=7, image_size=16, image_slots=3)
    assert list(spec) == names.split()
    assert all(shape[0] == 4 for shape, _ in spec.values())
    assert spec["text"] == ((4, 7), np.int32)
    if stage == "finetune":
        assert spec["image"] == ((4, 3, 16, 16, 3), np.uint8)
    elif stage != "language":
        assert spec["image"] == ((4, 16, 16, 3), np.uint8)


def test_unknown_names_are_sentences():
    with pytest.raises(ValueError, match=r"Stage 'four' is unknown; choose from language"):
        batch.spec("four", batch=1, text_length=1)
    with pytest.raises(ValueError, match="Language 'xx' has no prompt"):
        batch.caption_prompt("xx")
    assert batch.caption_prompt("zh") == "Chinese caption:"
