"""Held-out pictures, names and questions."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines import evaluation
from data_pipelines.datasets import open_dataset
from internvl_jax.batch import VICUNA_V1

CONFIG = {"dataset": "shapes", "image_size": 20}


@pytest.mark.parametrize(
    ("which", "count"), [("judged", 32), ("seen", 32), ("unseen", 4), ("all", 36)]
)
def test_held_out_pictures_stand_beside_their_names(which, count):
    pictures, dataset = evaluation.gallery(CONFIG, which=which), open_dataset("shapes")
    assert pictures.images.shape == (count, 20, 20, 3) and pictures.images.dtype == np.uint8
    np.testing.assert_array_equal(pictures.target, np.arange(count))
    assert set(pictures.names) == {"en", "zh", "ja", "ar", "it"}
    for record, concept, name in zip(pictures.records, pictures.concepts, pictures.names["it"]):
        assert dataset.vendor[record] == "turned"
        assert dataset.concepts[dataset.concept[record]] is concept
        assert concept.names["it"] == name
    assert not set(pictures.records) & set(dataset.splits["train"])


def test_validation_has_fewer_pictures_among_as_many_names():
    pictures = evaluation.gallery(CONFIG, split="validation", which="seen")
    dataset = open_dataset("shapes")
    assert len(pictures.images) == 6 and len(pictures.concepts) == 32
    for record, target in zip(pictures.records, pictures.target):
        assert dataset.concepts[dataset.concept[record]] is pictures.concepts[target]


def test_mismatches_are_wrong_and_repeatable():
    pictures = evaluation.gallery(CONFIG)
    wrong = evaluation.mismatches(pictures, "zh")
    names = np.asarray(pictures.names["zh"])
    assert (names[wrong] != names[pictures.target]).all() and len(set(wrong)) > 10
    np.testing.assert_array_equal(wrong, evaluation.mismatches(pictures, "zh"))
    assert (wrong != evaluation.mismatches(pictures, "zh", seed=1)).any()


@pytest.mark.parametrize("kind", ["what", "which", "is", "language"])
def test_questions_have_right_answers(kind):
    pictures = evaluation.gallery(CONFIG)
    asked = evaluation.questions(pictures, kind)
    assert asked == evaluation.questions(pictures, kind)
    for entry, record, target in zip(asked, pictures.records, pictures.target):
        human, answer = (turn["value"] for turn in entry["conversations"])
        names = pictures.concepts[target].names
        assert human.startswith("<image>\n") and entry["image"] == str(record)
        if kind == "what":
            assert answer == names[entry["language"]] and entry["choices"] == []
        elif kind == "which":
            options = dict(line.split(". ", 1) for line in human.splitlines()[2:])
            assert list(options) == entry["choices"] == ["A", "B"]
            assert options["A"] != options["B"] and options[answer] == names[entry["language"]]
        elif kind == "is":
            assert answer == ("Yes" if names[entry["language"]] in human else "No")
        else:
            # 三角形 and 正方形 mean the same in Chinese and Japanese, their colours differ.
            assert answer in entry["choices"] and names[entry["language"]] in human
    if kind in ("which", "is"):
        first = [e["conversations"][1]["value"] == e["choices"][0] for e in asked]
        assert 0.2 < np.mean(first) < 0.8  # the place of an answer says nothing


def test_open_prompts_end_before_the_answer():
    entry = evaluation.questions(evaluation.gallery(CONFIG), "which")[0]
    (segment,) = VICUNA_V1.segments(evaluation.open_prompt(entry["conversations"]))
    assert segment.text.endswith("ASSISTANT:") and segment.text.count("<image>") == 1


def test_wrong_names_of_splits():
    with pytest.raises(ValueError, match="Split 'train' is not for judging"):
        evaluation.gallery(CONFIG, split="train")
    with pytest.raises(ValueError, match="Concepts 'some' are unknown"):
        evaluation.gallery(CONFIG, which="some")


def test_counts():
    assert evaluation.describe(open_dataset("shapes")) == {
        "concepts": 36, "judged": 32, "unseen": 4,
        "train": 90, "validation": 6, "unseen_drawings": 12, "held_out": 36,
    }  # fmt: skip
