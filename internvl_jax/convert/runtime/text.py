"""Texts and conversations -> token ids: a sentencepiece model with LLaMA's conventions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .chat import IMAGE_TOKEN
from .config import IMAGE_PLACEHOLDER, FolderError, Template, TextConfig


class Tokenizer:
    """Ids as the model was trained on them: BOS in front, EOS last."""

    def __init__(self, folder: str | Path, config: TextConfig):
        """Loads the folder's tokenizer. Raises FolderError if there is none or it is damaged."""
        try:
            import sentencepiece
        except ImportError:
            raise FolderError("Texts need sentencepiece: pip install sentencepiece.") from None
        path = Path(folder) / (config.tokenizer or "tokenizer.model")
        if not path.is_file():
            raise FolderError(f"{folder} lacks {path.name}: export it with its tokenizer.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, ValueError):
            raise FolderError(f"{path} is not a sentencepiece model: copy it again.") from None
        self.config = config

    def ids(self, text: str) -> list[int]:
        """Ids of a text alone."""
        return self._model.encode(text)

    def rows(self, texts: Sequence[str], prefix: str = "") -> tuple[Tensor, Tensor]:
        """Whole texts, cut to the model's length with EOS kept last.

        Args:
            texts: B texts.
            prefix: glued in front of each.

        Returns:
            ids int64 [B, T], right-padded to the longest, and lengths int64 [B].
        """
        config = self.config
        rows = [
            [config.bos_id, *self.ids(prefix + text)[: config.length - 2], config.eos_id]
            for text in texts
        ]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), config.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids, lengths

    def prompt(self, text: str) -> list[int]:
        """What stands before a caption: BOS and the text, without EOS."""
        return [self.config.bos_id, *self.ids(text)]

    def conversation(self, turns: Sequence[Mapping[str, Any]], visual_tokens: int) -> list[int]:
        """A conversation that is open for its next answer.

        Args:
            turns: ``{"from": "human" | "gpt", "value": text}`` in alternation, from the human's
                question on to a question; ``<image>`` where a picture is shown.
            visual_tokens: `IMAGE_TOKEN`s that stand for one picture.

        Returns:
            ids from BOS on.

        Raises:
            ValueError: if the turns do not alternate or there is no question to answer.
        """
        template, config = self.config.template, self.config
        if template is None:
            raise ValueError("This model holds no conversations.")
        if len(turns) % 2 == 0:
            raise ValueError("A conversation must end with a question, so with a human's turn.")
        ids = [config.bos_id]
        for turn, message in enumerate(turns):
            human = turn % 2 == 0
            if message["from"] != ("human" if human else "gpt"):
                raise ValueError(
                    f"Turn {turn} of the conversation is from {message['from']!r}; turns must "
                    "alternate between 'human' and 'gpt', beginning with 'human'."
                )
            value = str(message["value"])
            said = _question(template, value, turn == 0) if human else _answer(template, value)
            for piece, text in enumerate(said.split(IMAGE_PLACEHOLDER)):
                if piece:
                    ids += [IMAGE_TOKEN] * visual_tokens
                if text:
                    ids += self.ids(text)
            if not human and template.roles:
                ids.append(config.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids and ids beyond the file are left out."""
        config, size = self.config, self._model.get_piece_size()
        special = (self._model.unk_id(), config.bos_id, config.eos_id, config.pad_id)
        return self._model.decode([i for i in ids if 0 <= i < size and i not in special])


def _question(template: Template, value: str, first: bool) -> str:
    images = value.count(IMAGE_PLACEHOLDER)
    value = value.replace(IMAGE_PLACEHOLDER, "").strip()
    if not template.roles:
        return IMAGE_PLACEHOLDER * images
    value = (f"{IMAGE_PLACEHOLDER}\n" * images + value).strip()
    system = f"{template.system} " if first and template.system else ""
    return f"{system}{template.user}: {value} {template.assistant}:"


def _answer(template: Template, value: str) -> str:
    return value.strip() if template.roles else value.strip() + "\n"
