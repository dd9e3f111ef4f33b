"""What a batch holds: the leaf that models, stages and data share (numpy only).

A batch is one flat ``dict[str, array]``; axis 0 is the global batch ``B``. Token rows are int32 and
right-padded, masks are bool, labels are int32 and **unshifted** (a label stands at the position of
its own token; the loss shifts), images are uint8 and normalised on the device with `MEAN`, `STD`.
Where the device crops as well, an image is a canvas [C,C,3] and ``crop`` [B,5] or [B,M,5] float32
says what to cut out: top, left, height, width, and 1 for a mirror image.

============  ==============================================================================
stage         arrays
============  ==============================================================================
language      text [B,T], text_mask [B,T], labels [B,T]
contrastive   image [B,S,S,3]; text, text_mask: "summarize:" + caption, BOS..EOS
generative    image [B,S,S,3]; positive(_mask): the caption; negative(_mask): another image's
              caption; summarize(_mask): "summarize:" + caption (all BOS..EOS);
              text(_mask), labels: prompt (BOS, no EOS) + caption (EOS), see `caption_labels`;
              image_id [B]: equal where two images may share their captions
finetune      image [B,M,S,S,3] (unused slots zero); text, labels [B,T] with every "<image>"
              expanded to the visual tokens, each of them `IMAGE_TOKEN`; segment [B,T]: 1, 2, … for
              the conversations of a row, 0 on padding
============  ==============================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32

IGNORE = -100
"""Label of a position that is not learned."""
IMAGE_TOKEN = -200
"""Token id at which one visual token is spliced in."""
IMAGE_PLACEHOLDER = "<image>"

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

SUMMARIZE = "summarize:"
"""Prefix of every text that the contrastive encoder reads, glued on without a space."""

LANGUAGES = {
    "en": "English", "zh": "Chinese", "ja": "Japanese", "ar": "Arabic", "it": "Italian",
    "es": "Spanish", "de": "German", "fr": "French", "ru": "Russian", "ko": "Korean",
    "pt": "Portuguese", "tr": "Turkish", "fa": "Persian", "id": "Indonesian", "hi": "Hindi",
    "th": "Thai", "vi": "Vietnamese", "pl": "Polish", "nl": "Dutch", "uk": "Ukrainian",
}  # fmt: skip
"""Language code -> the English name that prompts use."""

STAGES = ("language", "contrastive", "generative", "finetune")


def caption_prompt(language: str) -> str:
    """The prompt before a caption in a language, e.g. "English caption:".

    Args:
        language: code in `LANGUAGES`.

    Returns:
        The prompt, without a trailing space.

    Raises:
        ValueError: if the language is not listed.
    """
    if language not in LANGUAGES:
        raise ValueError(
            f"Language {language!r} has no prompt; choose from {', '.join(LANGUAGES)}."
        )
    return f"{LANGUAGES[language]} caption:"


def spec(
    stage: str,
    *,
    batch: int,
    text_length: int,
    image_size: int = 0,
    image_slots: int = 1,
    canvas: int = 0,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of one stage's global batch.

    Args:
        stage: one of `STAGES`.
        batch: global batch size B.
        text_length: tokens per row T.
        image_size: side S in pixels.
        image_slots: images per example M (finetune only).
        canvas: side C of the canvases that stand for images, with what to crop from them; 0 where
            the host crops.

    Returns:
        Array name -> (shape, dtype).

    Raises:
        ValueError: if the stage is unknown.
    """
    row = (batch, text_length)
    tokens, mask = (row, np.dtype(np.int32)), (row, np.dtype(np.bool_))
    side = canvas or image_size
    image = ((batch, side, side, 3), np.dtype(np.uint8))
    crop = {"crop": ((batch, 5), np.dtype(np.float32))} if canvas else {}
    text = {"text": tokens, "text_mask": mask}
    if stage == "language":
        return {**text, "labels": tokens}
    if stage == "contrastive":
        return {"image": image, **crop, **text}
    if stage == "generative":
        rows = {}
        for name in ("positive", "negative", "summarize"):
            rows |= {name: tokens, f"{name}_mask": mask}
        image_id = ((batch,), np.dtype(np.int32))
        return {"image": image, **crop, **rows, **text, "labels": tokens, "image_id": image_id}
    if stage == "finetune":
        slots = ((batch, image_slots, *image[0][1:]), image[1])
        if canvas:
            crop = {"crop": ((batch, image_slots, 5), np.dtype(np.float32))}
        return {"image": slots, **crop, "text": tokens, "segment": tokens, "labels": tokens}
    raise ValueError(f"Stage {stage!r} is unknown; choose from {', '.join(STAGES)}.")


def caption_labels(
    ids: Int32[np.ndarray, "*B T"], mask: Bool[np.ndarray, "*B T"], prompt_length: int
) -> Int32[np.ndarray, "*B T"]:
    """Labels of a captioning row [prompt | caption | pad].

    The last prompt token stays a label, as in the original (ITG of the stage-2 loss).

    Args:
        ids: [..., T] int32 tokens, right-padded.
        mask: [..., T] bool, true at tokens.
        prompt_length: tokens of the prompt including BOS.

    Returns:
        [..., T] int32 labels, `IGNORE` on pads and on the first ``prompt_length - 1`` positions.
    """
    position = np.arange(ids.shape[-1])
    return np.where(mask & (position >= prompt_length - 1), ids, IGNORE).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation that is tokenised on its own.

    Attributes:
        text: may hold `IMAGE_PLACEHOLDER`.
        learned: whether its tokens (and its EOS) are labels.
        eos: whether an EOS token follows.
    """

    text: str
    learned: bool
    eos: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation becomes text, and which of it is learned.

    Segments are encoded one by one; the space that sentencepiece puts before each of them is the
    space between role and answer, which gives the ids of LLaVA's joint tokenisation. Rounds follow
    one another without a separator but the EOS of the answer.

    Attributes:
        name: as configs call it.
        system: text before the first turn.
        user: role before a question, ends the question part with `assistant`.
        assistant: role before an answer.
        roles: False for captions only: no system text, no roles, an answer ends with a newline
            instead of EOS.
    """

    name: str
    system: str = ""
    user: str = ""
    assistant: str = ""
    roles: bool = True

    def segments(self, conversation: Sequence[Mapping[str, str | None]]) -> list[Segment]:
        """Renders a conversation in LLaVA's format.

        Args:
            conversation: turns ``{"from": "human" | "gpt", "value": text}`` in alternation,
                beginning with the human. A last answer of None (or a missing one) leaves the
                prompt open for generation.

        Returns:
            Alternating question and answer segments.

        Raises:
            ValueError: if the turns do not alternate.
        """
        segments = []
        for turn, message in enumerate(conversation):
            human = turn % 2 == 0
            if message["from"] != ("human" if human else "gpt"):
                raise ValueError(
                    f"Turn {turn} of the conversation is from {message['from']!r}; turns must "
                    "alternate between 'human' and 'gpt', beginning with 'human'."
                )
            value = message["value"]
            if value is None:
                break
            if human:
                segments.append(Segment(self._question(value, first=turn == 0), learned=False))
            elif self.roles:
                segments.append(Segment(value.strip(), learned=True, eos=True))
            else:
                segments.append(Segment(value.strip() + "\n", learned=True))
        return segments

    def _question(self, value: str, first: bool) -> str:
        images = value.count(IMAGE_PLACEHOLDER)
        value = value.replace(IMAGE_PLACEHOLDER, "").strip()
        if not self.roles:
            return IMAGE_PLACEHOLDER * images
        value = (f"{IMAGE_PLACEHOLDER}\n" * images + value).strip()
        system = f"{self.system} " if first and self.system else ""
        return f"{system}{self.user}: {value} {self.assistant}:"


VICUNA_V1 = Template(
    name="vicuna_v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    user="USER",
    assistant="ASSISTANT",
)
PLAIN = Template(name="plain", roles=False)
TEMPLATES = {template.name: template for template in (VICUNA_V1, PLAIN)}


def template_named(name: str) -> Template:
    """A template by its name in `TEMPLATES`. Raises ValueError for one that is not there."""
    if name not in TEMPLATES:
        raise ValueError(
            f"The conversation template {name!r} is unknown here: only {', '.join(TEMPLATES)} can "
            "be rendered."
        )
    return TEMPLATES[name]


def tokenize(
    segments: Sequence[Segment],
    encode: Callable[[str], Sequence[int]],
    *,
    bos: int,
    eos: int,
    visual_tokens: int,
) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
    """Tokenises rendered segments and masks the labels (spec of LLaVA's `preprocess_v1`).

    Args:
        segments: from `Template.segments`.
        encode: text -> ids, without BOS and EOS.
        bos: id put in front.
        eos: id put after segments that ask for it.
        visual_tokens: copies V of `IMAGE_TOKEN` for each placeholder.

    Returns:
        ids and labels, int32 of the same length; labels are `IGNORE` outside learned segments.
    """
    ids, labels = [bos], [IGNORE]
    for segment in segments:
        start = len(ids)
        for piece, text in enumerate(segment.text.split(IMAGE_PLACEHOLDER)):
            if piece:
                ids += [IMAGE_TOKEN] * visual_tokens
            if text:
                ids += encode(text)
        if segment.eos:
            ids.append(eos)
        labels += ids[start:] if segment.learned else [IGNORE] * (len(ids) - start)
    return np.asarray(ids, np.int32), np.asarray(labels, np.int32)


def pad_rows(
    rows: Sequence[Sequence[int] | Int32[np.ndarray, "_"]], length: int, fill: int
) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Cuts rows to a length and pads them on the right.

    Args:
        rows: B token rows of any length.
        length: T.
        fill: the id of a pad.

    Returns:
        ids [B,T] int32 and mask [B,T] bool (true at tokens).
    """
    ids = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        kept = np.asarray(row[:length], np.int32)
        ids[i, : len(kept)] = kept
        mask[i, : len(kept)] = True
    return ids, mask
