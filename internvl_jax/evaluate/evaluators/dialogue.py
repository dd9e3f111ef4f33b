"""Closed questions to the chat model, answered by generation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.evaluation import Gallery, open_prompt, questions
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IMAGE_PLACEHOLDER, TEMPLATES, tokenize
from internvl_jax.evaluate.embed import in_batches
from internvl_jax.evaluate.evaluators.selection import pick, thin
from internvl_jax.evaluate.metrics.answers import choice, normalize
from internvl_jax.generate.prompt import chat, left_pad
from internvl_jax.generate.settings import Settings

WIDTH = 32
"""Prompts and answers are padded to a multiple of it, so that few shapes are compiled."""


class Case(NamedTuple):
    """A picture [S, S, 3] and a question about it (`data_pipelines.evaluation.questions`)."""

    image: np.ndarray
    question: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Closed questions in the format of the training set, on pictures it does not hold.

    The model's greedy answer is compared with the allowed ones (`metrics.answers.choice`); an
    answer that is none of them is wrong. The wrong names come from the gallery's own concepts, so
    on unseen concepts both names are new to the model. Of two choices the first and the second are
    right equally often.
    Figures per language and kind: ``which_accuracy``, ``which_chance`` (drawing one of the
    choices), ``which_constant`` (always the same choice, the better one), ``which_unparsable``,
    ``which_n``; and over all languages without the language's code.

    Attributes:
        gallery: pictures and candidates.
        tokenizer: of the language model.
        kinds: "which" (of these two names), "is" (it a ...).
        template: of the conversation, a key of `batch.TEMPLATES`.
        name: of the list.
        limit: at most so many pictures, evenly spread.
        batch_size: questions per call of the model.
        seed: of the wrong names and of the order of the choices.
    """

    gallery: Gallery
    tokenizer: Tokenizer
    kinds: tuple[str, ...] = ("which", "is")
    template: str = "vicuna_v1"
    name: str = "fluent"
    limit: int | None = None
    batch_size: int = 64
    seed: int = 0

    def run(self, model: Any) -> dict[str, float]:
        """`model` is an `InternVLChat`."""
        cases = self.cases()
        conversations = [open_prompt(case.question["conversations"]) for case in cases]
        return self.score(cases, self.answers(model, cases, conversations))

    def cases(self) -> list[Case]:
        """Every question: kinds x languages x pictures."""
        shown = thin(self.gallery, self.limit)
        return [
            Case(image, question)
            for (kind, language), seed in self._seeds(self.kinds).items()
            for image, question in zip(shown.images, balanced(shown, kind, language, seed))
        ]

    def _seeds(self, kinds: Sequence[str]) -> dict[tuple[str, str], int]:
        """(kind, language) -> the seed of its questions."""
        pairs = itertools.product(kinds, self.gallery.names)
        return {pair: self.seed + place for place, pair in enumerate(pairs)}

    def answers(
        self,
        model: Any,
        cases: Sequence[Case],
        conversations: Sequence[Sequence[dict[str, str | None]]],
    ) -> list[str]:
        """What the model says next in every conversation.

        Args:
            model: an `InternVLChat`.
            cases: whose pictures are shown.
            conversations: as many, ending in a question (`data_pipelines.evaluation.open_prompt`).

        Returns:
            As many answers.
        """
        tokenizer = self.tokenizer
        visual = model.cfg.visual_tokens(self.gallery.images.shape[1])
        prompts = [
            tokenize(
                TEMPLATES[self.template].segments(turns),
                tokenizer.ids,
                bos=tokenizer.bos_id,
                eos=tokenizer.eos_id,
                visual_tokens=visual,
            )[0]
            for turns in conversations
        ]
        settings = Settings(
            max_new_tokens=self._longest_answer(),
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

        def generate(images: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Any:
            return chat(model, images[:, None], ids, mask, settings)

        prompt = left_pad(prompts, tokenizer.pad_id, multiple=WIDTH)
        images = np.stack([case.image for case in cases])
        new = in_batches(generate, (images, *prompt), self.batch_size)
        return [tokenizer.decode(row).strip() for row in new]

    def _longest_answer(self) -> int:
        """Tokens of the longest name and its EOS: no answer is wrong for want of room."""
        names = {name for names in self.gallery.names.values() for name in names}
        longest = 1 + max(len(self.tokenizer.ids(answer)) for answer in {"Yes", "No"} | names)
        return -(-longest // WIDTH) * WIDTH

    def score(self, cases: Sequence[Case], answers: Sequence[str]) -> dict[str, float]:
        """The figures."""
        groups: dict[str, list[tuple[int | None, int, int]]] = {}
        for case, answer in zip(cases, answers):
            question = case.question
            given = choice(answer, question["choices"])
            right = question["choices"].index(question["conversations"][-1]["value"])
            for scope in (f"{self.name}.{question['language']}", self.name):
                group = groups.setdefault(f"{scope}.{question['kind']}", [])
                group.append((given, right, len(question["choices"])))
        out: dict[str, float] = {}
        for prefix, group in groups.items():
            places = [right for _, right, _ in group]
            most = max(places.count(place) for place in set(places))
            out |= {
                f"{prefix}_accuracy": sum(given == right for given, right, _ in group) / len(group),
                f"{prefix}_chance": sum(1 / options for _, _, options in group) / len(group),
                f"{prefix}_constant": most / len(group),
                f"{prefix}_unparsable": sum(given is None for given, _, _ in group) / len(group),
                f"{prefix}_n": float(len(group)),
            }
        return out

    def examples(
        self, model: Any, *, kinds: Sequence[str] = ("what", "which", "is"), count: int = 3
    ) -> list[dict[str, Any]]:
        """Conversations of several turns; every answer is part of the prompts that follow.

        Args:
            model: an `InternVLChat`.
            kinds: of the questions, in order; the languages take turns.
            count: pictures, spread evenly.

        Returns:
            Each ``{record, name, turns: [{language, question, answer, right, correct}]}``.
        """
        shown = thin(self.gallery, count)
        asked = {
            (kind, language): balanced(shown, kind, language, seed)
            for (kind, language), seed in self._seeds(kinds).items()
        }
        languages = list(shown.names)
        talks: list[list[dict[str, str | None]]] = [[] for _ in shown.images]
        turns: list[list[dict[str, Any]]] = [[] for _ in shown.images]
        for turn, kind in enumerate(kinds):
            cases = []
            for place, talk in enumerate(talks):
                question = asked[kind, languages[(place + turn) % len(languages)]][place]
                cases.append(Case(shown.images[place], question))
                text = question["conversations"][0]["value"]
                # The picture is shown once, in the first turn.
                text = text if turn == 0 else _words(text)
                talk.append({"from": "human", "value": text})
            for place, answer in enumerate(self.answers(model, cases, talks)):
                question = cases[place].question
                right = question["conversations"][-1]["value"]
                turns[place].append(
                    {
                        "language": question["language"],
                        "question": _words(question["conversations"][0]["value"]),
                        "answer": answer,
                        "right": right,
                        "correct": normalize(answer) == normalize(right),
                    }
                )
                talks[place].append({"from": "gpt", "value": answer})
        names = shown.names[languages[0]]
        return [
            {"record": int(record), "name": names[target], "turns": turns[place]}
            for place, (record, target) in enumerate(zip(shown.records, shown.target))
        ]


def balanced(gallery: Gallery, kind: str, language: str, seed: int) -> list[dict[str, Any]]:
    """One question about every picture; of two choices each is right for every other picture.

    Args:
        gallery: pictures and candidates.
        kind: of the questions.
        language: of the names in them.
        seed: questions whose right choice stands in the wrong place are drawn again.

    Returns:
        As many records as `data_pipelines.evaluation.questions` gives.
    """
    asked: dict[int, dict[str, Any]] = {}
    open_rows = np.arange(len(gallery.images))
    for draw in range(64):
        drawn = questions(pick(gallery, open_rows), kind, (language,), seed + 1000 * draw)
        asked |= {int(row): question for row, question in zip(open_rows, drawn)}
        open_rows = np.asarray(
            [
                row
                for row, question in zip(open_rows, drawn)
                if len(question["choices"]) == 2
                and question["choices"].index(question["conversations"][-1]["value"]) != row % 2
            ],
            np.int64,
        )
        if not open_rows.size:
            break
    return [asked[row] for row in range(len(gallery.images))]


def _words(text: str) -> str:
    """A first question without the placeholder of its picture."""
    return text.replace(IMAGE_PLACEHOLDER, "").strip()
