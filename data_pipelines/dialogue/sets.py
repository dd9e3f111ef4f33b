"""The sets of the paper's Table 3: what each is read by, and how large it should be."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator

from data_pipelines.dialogue import captions, dialogues, grounding, questions, reading
from data_pipelines.dialogue.annotations import Annotations
from data_pipelines.dialogue.conversation import Conversation
from data_pipelines.dialogue.pictures import key
from data_pipelines.dialogue.prompts import SHORT_ANSWER, SHORT_ANSWER_ZH
from data_pipelines.sample import Turn
from internvl_jax.batch import IMAGE_PLACEHOLDER

PAPER = {
    "captioning": 588_000,
    "vqa": 1_100_000,
    "ocr": 294_000,
    "grounding": 323_000,
    "grounded_captioning": 284_000,
    "conversation": 1_400_000,
}
"""Samples by task in Table 3 of the paper, which gives no count by set."""


@dataclasses.dataclass(frozen=True)
class Set:
    """One set.

    Attributes:
        reader: its annotation files -> conversations.
        tasks: that its conversations are of.
        size: conversations its training split gives before anything is left out, by its authors'
            counts as remembered (not counted here); 0 where we know no certain figure.
        paper: whether the paper names it (IconQA's choices that are pictures are an extra).
    """

    reader: Callable[[Annotations], Iterator[Conversation]]
    tasks: tuple[str, ...]
    size: int = 0
    paper: bool = True


REFERRING = ("grounding", "grounded_captioning")
SETS = {
    "coco_caption": Set(captions.coco_caption, ("captioning",), 566_747),
    "textcaps": Set(captions.textcaps, ("captioning",), 21_953),
    "vqav2": Set(questions.vqav2, ("vqa",), 443_757),
    "okvqa": Set(questions.okvqa, ("vqa",), 9_009),
    "aokvqa": Set(questions.aokvqa, ("vqa",), 17_056),
    "iconqa": Set(questions.iconqa, ("vqa",)),
    "iconqa_pictures": Set(questions.iconqa_pictures, ("vqa",), paper=False),
    "ai2d": Set(questions.ai2d, ("vqa",)),
    "gqa": Set(questions.gqa, ("vqa",), 943_000),
    "ocrvqa": Set(reading.ocrvqa, ("ocr",)),
    "chartqa": Set(reading.chartqa, ("ocr",), 28_299),
    "docvqa": Set(reading.docvqa, ("ocr",), 39_463),
    "stvqa": Set(reading.stvqa, ("ocr",)),
    "estvqa": Set(reading.estvqa, ("ocr",)),
    "infovqa": Set(reading.infovqa, ("ocr",), 23_946),
    "llavar": Set(dialogues.llavar, ("ocr",), 20_000),
    "refcoco": Set(grounding.refcoco, REFERRING, 2 * 120_624),
    "refcoco+": Set(grounding.refcoco, REFERRING, 2 * 120_191),
    "refcocog": Set(grounding.refcoco, REFERRING, 2 * 80_512),
    "toloka": Set(grounding.toloka, ("grounding",), 38_990),
    "llava_150k": Set(dialogues.llava_150k, ("conversation",), 157_712),
    "svit": Set(dialogues.svit, ("conversation",)),
    "visdial": Set(dialogues.visdial, ("conversation",), 123_287),
    "lrv": Set(dialogues.lrv, ("conversation",), 342_799),
    "mix665k": Set(dialogues.mix665k, ("conversation",), 665_298),
}
"""By the name that the command line, the folders and the records use."""


def read(notes: Annotations, exclude: frozenset[str] = frozenset()) -> Iterator[Conversation]:
    """The conversations of a set's training split.

    Args:
        notes: the set's name and files; bad records are counted there.
        exclude: pictures that no conversation may show, from `held_out.collect`.

    Yields:
        Conversations; one that shows an excluded picture is counted as "held-out picture".

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the set is unknown or a file is damaged.
    """
    if notes.name not in SETS:
        raise ValueError(f"The set {notes.name!r} is unknown; choose from {', '.join(SETS)}.")
    for conversation in SETS[notes.name].reader(notes):
        shown = [path for path in conversation.images if key(path) in exclude]
        if shown:
            place = f"{conversation.source} {conversation.id}"
            notes.skip("held-out picture", f"{place} shows {shown[0]}.")
        else:
            yield conversation


def gather(conversations: Iterable[Conversation], rounds: int) -> Iterator[Conversation]:
    """Joins the questions on one picture into one conversation, as LLaVA-1.5's mixture does.

    A picture then passes through the encoder once for all of its questions. The paper does not say
    whether it joined them. Captions stay apart (each would give the next one away), and so do
    descriptions and locations of one box.

    Args:
        conversations: of one set; they are held in memory.
        rounds: questions a conversation has at most.

    Yields:
        Conversations in the order of their first picture. The short-answer prompt stays with the
        first question only.
    """
    groups: dict[tuple, list[Conversation]] = collections.defaultdict(list)
    for conversation in conversations:
        if conversation.task in ("captioning", "conversation") or not conversation.images:
            yield conversation
        else:
            groups[conversation.task, conversation.images].append(conversation)
    for group in groups.values():
        for start in range(0, len(group), rounds):
            yield _joined(group[start : start + rounds])


def _joined(group: list[Conversation]) -> Conversation:
    first = group[0]
    turns = list(first.turns)
    for other in group[1:]:
        question = other.turns[0].value.removeprefix(f"{IMAGE_PLACEHOLDER}\n" * len(other.images))
        for prompt in (SHORT_ANSWER, SHORT_ANSWER_ZH):
            if turns[0].value.endswith(prompt):
                question = question.removesuffix(f"\n{prompt}")
        turns += [Turn("human", question), *other.turns[1:]]
    box = first.box if len(group) == 1 else None
    return dataclasses.replace(first, turns=tuple(turns), box=box)
