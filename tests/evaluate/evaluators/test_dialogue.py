"""Closed questions: the protocol, an oracle, and a random model end to end."""

from __future__ import annotations

import dataclasses

import pytest

from data_pipelines.evaluation import gallery, open_prompt
from internvl_jax.evaluate.evaluators.dialogue import Dialogue


@pytest.fixture(scope="module")
def dialogue(tokenizer):
    shapes = gallery(
        {"dataset": "shapes", "image_size": 16}, which="judged", languages=("en", "ar")
    )
    return Dialogue(shapes, tokenizer, name="turned", batch_size=8)


def right(cases):
    return [case.question["conversations"][-1]["value"] for case in cases]


def test_an_oracle_is_perfect_and_closed_questions_are_balanced(dialogue):
    cases = dialogue.cases()
    figures = dialogue.score(cases, right(cases))
    assert len(cases) == 2 * 2 * 32
    for key in ("turned.en.which", "turned.ar.is", "turned.which", "turned.is"):
        assert figures[f"{key}_accuracy"] == 1 and figures[f"{key}_unparsable"] == 0
        assert figures[f"{key}_chance"] == 0.5 and figures[f"{key}_constant"] == 0.5
    assert figures["turned.which_n"] == 64 and figures["turned.ar.which_n"] == 32


def test_the_other_choice_and_no_choice_are_wrong(dialogue):
    cases = dialogue.cases()
    other = []
    for case in cases:
        truth = case.question["conversations"][-1]["value"]
        other.append(next(c for c in case.question["choices"] if c != truth))
    figures = dialogue.score(cases, other)
    assert figures["turned.which_accuracy"] == 0 and figures["turned.which_unparsable"] == 0
    figures = dialogue.score(cases, [f"it is {answer}" for answer in right(cases)])
    assert figures["turned.is_accuracy"] == 0 and figures["turned.is_unparsable"] == 1


def test_one_constant_answer_scores_what_the_page_says(dialogue):
    cases = [case for case in dialogue.cases() if case.question["kind"] == "is"]
    rates = [
        dialogue.score(cases, [word] * len(cases))["turned.is_accuracy"] for word in ("Yes", "No")
    ]
    assert max(rates) == pytest.approx(dialogue.score(cases, right(cases))["turned.is_constant"])


def test_questions_do_not_change_and_never_give_the_answer(dialogue):
    again = [case.question for case in dialogue.cases()]
    assert again == [case.question for case in dialogue.cases()]
    for case in dialogue.cases():
        turns = open_prompt(case.question["conversations"])
        assert [turn["from"] for turn in turns] == ["human"]
        if case.question["kind"] == "which":
            assert all(f"\n{letter}. " in turns[0]["value"] for letter in "AB")
            assert "ASSISTANT" not in turns[0]["value"]


def test_a_random_model_answers_every_question(dialogue, chat_model):
    dialogue = dataclasses.replace(dialogue, limit=3, kinds=("which",))
    figures = dialogue.run(chat_model)
    assert figures["turned.which_n"] == 6 and 0 <= figures["turned.which_accuracy"] <= 1
    talks = dialogue.examples(chat_model, kinds=("what", "is"), count=2)
    assert [len(talk["turns"]) for talk in talks] == [2, 2]
    assert [turn["language"] for turn in talks[1]["turns"]] == ["ar", "en"]
