"""What a corpus holds: pictures with captions, or conversations about pictures.

Every source, whatever its format, ends here, and every stage's rows are made from here.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Caption:
    """A text about a picture.

    Attributes:
        text: the caption.
        language: code in `internvl_jax.batch.LANGUAGES`, "" where it is not known.
        prompt: words that come before it and are tokenised on their own (language stage).
    """

    text: str
    language: str = ""
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation, as LLaVA names them.

    Attributes:
        role: "human" or "gpt"; they alternate, beginning with the human.
        value: the text; "<image>" stands where a picture comes.
    """

    role: str
    value: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One record.

    Attributes:
        key: names it for a person, e.g. "00042/000421337" or "vqav2/458752000".
        images: encoded pictures in the order of their "<image>", or pixels [H,W,3] uint8.
        captions: texts that are true of the pictures; one is drawn.
        negative: a text of another picture (generative stage).
        turns: a conversation; empty where there are captions.
        group: equal where two samples may share their captions.
    """

    key: str
    images: tuple[bytes | np.ndarray, ...] = ()
    captions: tuple[Caption, ...] = ()
    negative: Caption | None = None
    turns: tuple[Turn, ...] = ()
    group: int = 0


class BadRecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        reason: one or two words that such records are counted by, e.g. "truncated".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))
