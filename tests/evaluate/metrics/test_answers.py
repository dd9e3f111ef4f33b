"""Parsing and scoring of generated texts."""

from __future__ import annotations

import itertools

import pytest

from internvl_jax.evaluate.metrics.answers import choice, hit_rate, normalize, parts


def test_normalize():
    assert normalize("  The  Cat.\n") == "the cat"
    assert normalize("Ｃａｔ！") == "cat"
    assert normalize("猫。") == "猫"
    assert normalize("قطة؟") == "قطة"
    assert normalize("...") == "..."
    assert normalize("") == ""


def test_parts():
    assert parts("Pet, cat ") == {"pet", "cat", "pet, cat"}
    assert parts("قطة، حيوان") == {"قطة", "حيوان", "قطة، حيوان"}
    assert parts("ペット、猫") == {"ペット", "猫", "ペット、猫"}
    assert parts(" , ") == {","}
    assert parts("") == frozenset()


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("Yes", ("Yes", "No"), 0),
        (" no. ", ("Yes", "No"), 1),
        ("not at all", ("Yes", "No"), None),
        ("No, yes", ("Yes", "No"), None),
        ("", ("Yes", "No"), None),
        ("cat face", ("cat", "cat face"), 1),
        ("cat", ("cat", "cat face"), 0),
        ("a cat", ("cat", "dog"), None),
        ("قطة", ("كلب", "قطة"), 1),
        ("cat", ("Cat", "cat"), None),  # both fit: neither counts
    ],
)
def test_choice(answer, choices, expected):
    assert choice(answer, choices) == expected


def test_hit_rate_equals_counting_pairs():
    answers = [{"cat", "pet"}, {"dog"}, {"cat"}, {"zebra"}, set()]
    accepted = [{"cat", "pet"}, {"dog", "pet"}, {"horse", "animal"}, {"zebra"}, {"pet"}]
    found = hit_rate(answers, accepted)
    assert found.rate == pytest.approx(3 / 5)
    pairs = [bool(a & b) for a, b in itertools.product(answers, accepted)]
    assert found.shuffled == pytest.approx(sum(pairs) / 25)
    # The longest answer has two items: "pet" (three pictures) and one more.
    assert found.constant == pytest.approx(4 / 5)


def test_hit_rate_of_one_item_has_the_majority_beside_it():
    found = hit_rate([{"a"}, {"a"}, {"b"}, {"c"}], [{"a"}, {"a"}, {"a"}, {"b"}])
    assert found == pytest.approx((0.5, (2 * 3 + 1) / 16, 0.75))


def test_hit_rate_needs_an_answer_a_picture():
    with pytest.raises(ValueError, match="0 answers and 1 pictures"):
        hit_rate([], [{"a"}])
