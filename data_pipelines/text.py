"""Text to tokens: a sentencepiece model with LLaMA's conventions."""

from __future__ import annotations

import operator
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

UNK, BOS, EOS = 0, 1, 2
PAD_PIECE = "[PAD]"


class Tokenizer:
    """A sentencepiece ``tokenizer.model`` with LLaMA's special ids (unk 0, bos 1, eos 2).

    Equals the slow LLaMA tokenizer of transformers in legacy mode, but for special tokens spelled
    out in a text: "</s>" in a caption stays text here and never ends a row.
    The pad id is the file's own pad piece, else its piece "[PAD]", else one id beyond the file
    (Chinese-LLaMA-Alpaca: 49,953 pieces and pad 49,953); pads are told by the mask, never by id.
    Picklable: a worker loads the file again.

    Attributes:
        vocab_size: ids a model must embed, the pad included.
        pad_id: id of padding.
    """

    bos_id, eos_id, unk_id = BOS, EOS, UNK

    def __init__(self, path: str | os.PathLike, *, vocab_size: int | None = None):
        """Loads a model file and checks it.

        Args:
            path: the ``tokenizer.model``.
            vocab_size: rows of the embedding that will read the ids, checked if given.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no such model, or its ids or size do not fit.
        """
        import sentencepiece

        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no tokenizer at {self.path}; give the path of a sentencepiece "
                "tokenizer.model, or build one with python -m data_pipelines.build."
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is not a sentencepiece model; give LLaMA's tokenizer.model "
                "(not tokenizer.json)."
            ) from error
        found = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if found != (UNK, BOS, EOS):
            raise ValueError(
                f"{self.path} has unk, bos, eos = {found}, but LLaMA's models have "
                f"{(UNK, BOS, EOS)}; use a tokenizer of the LLaMA family."
            )
        pieces = self._model.get_piece_size()
        self.pad_id = self._model.pad_id()
        if self.pad_id < 0:
            listed = self._model.piece_to_id(PAD_PIECE)
            self.pad_id = pieces if listed == UNK else listed
        self.vocab_size = max(pieces, self.pad_id + 1)
        self._expected = vocab_size
        if vocab_size == pieces < self.vocab_size:
            # The model has no row for the extra pad: pad with unk, as the original evaluation does.
            self.pad_id, self.vocab_size = UNK, pieces
        elif vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"{self.path} has {self.vocab_size} ids (pad {self.pad_id} included), but the "
                f"model's vocabulary is {vocab_size}; use the model's own tokenizer or set its "
                "vocabulary size to match."
            )

    def __reduce__(self):
        return (_load, (self.path, self._expected))

    def ids(self, text: str) -> list[int]:
        """Ids of a text alone.

        Args:
            text: any text; an empty one has no ids.

        Returns:
            ids without BOS and EOS.
        """
        return self._model.encode(text)

    def row(
        self, text: str, length: int, *, bos: bool = True, eos: bool = True, prompt: str = ""
    ) -> list[int]:
        """Ids of one row, cut to a length with EOS kept last.

        Args:
            text: the text.
            length: most tokens in the row.
            bos: put BOS in front.
            eos: put EOS last.
            prompt: text before it that is tokenised on its own (and never cut); use plain
                concatenation for prefixes that are glued on.

        Returns:
            At most ``length`` ids.

        Raises:
            ValueError: if the prompt leaves no room for one token of text.
        """
        head = [BOS] * bos + (self.ids(prompt) if prompt else [])
        room = length - len(head) - eos
        if room < 1:
            raise ValueError(
                f"A row of {length} tokens is too short for the prompt {prompt!r} "
                f"({len(head)} tokens) and a text; raise text_length."
            )
        return head + self.ids(text)[:room] + [EOS] * eos

    def encode(
        self, text: str, length: int, *, bos: bool = True, eos: bool = True, prompt: str = ""
    ) -> tuple[Int32[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
        """One padded row.

        Args:
            text: the text.
            length: T.
            bos: put BOS in front.
            eos: put EOS last, kept when the row is cut.
            prompt: see `row`.

        Returns:
            ids [T] int32, right-padded with `pad_id`; mask [T] bool.
        """
        row = self.row(text, length, bos=bos, eos=eos, prompt=prompt)
        ids = np.full(length, self.pad_id, np.int32)
        ids[: len(row)] = row
        return ids, np.arange(length) < len(row)

    def encode_batch(
        self, texts: Sequence[str], length: int, *, bos: bool = True, eos: bool = True
    ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Padded rows of many texts.

        Args:
            texts: B texts.
            length: T.
            bos: put BOS in front.
            eos: put EOS last.

        Returns:
            ids [B,T] int32 and mask [B,T] bool.
        """
        rows = [self.encode(text, length, bos=bos, eos=eos) for text in texts]
        ids = np.stack([row[0] for row in rows]) if rows else np.zeros((0, length), np.int32)
        mask = np.stack([row[1] for row in rows]) if rows else np.zeros((0, length), np.bool_)
        return ids, mask

    def piece(self, token: int) -> str:
        """What an id stands for, for people to read.

        Args:
            token: any integer.

        Returns:
            The piece with spaces instead of "▁", or "⟨id⟩" where the file has none.
        """
        if not 0 <= token < self._model.get_piece_size():
            return f"⟨{token}⟩"
        return self._model.id_to_piece(token).replace("▁", " ")

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids; special ids, image tokens and ids beyond the file are left out.

        Args:
            ids: any integers.

        Returns:
            The text.
        """
        size = self._model.get_piece_size()
        special = (UNK, BOS, EOS, self.pad_id)
        return self._model.decode(
            [i for i in map(operator.index, ids) if 0 <= i < size and i not in special]
        )


def _load(path: pathlib.Path, vocab_size: int | None) -> Tokenizer:
    return Tokenizer(path, vocab_size=vocab_size)


def train(texts: Iterable[str], path: str | os.PathLike, *, vocab_size: int = 8000) -> Tokenizer:
    """Trains a byte-fallback BPE model with a pad piece; the same texts give the same file.

    Args:
        texts: the corpus, one text each.
        path: where to write the model; a folder is made, an existing file replaced at once.
        vocab_size: most ids; fewer if the corpus does not have as many merges.

    Returns:
        The tokenizer, loaded from the file.

    Raises:
        ValueError: if the corpus is empty or the vocabulary is too small for it.
    """
    import sentencepiece

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"There are no texts to train the tokenizer {path} on.")
    writing = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(writing, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                split_digits=True,
                # Rare characters go to bytes, as in LLaMA's own model.
                character_coverage=0.99995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                pad_id=3,
                pad_piece=PAD_PIECE,
                num_threads=1,
                minloglevel=2,
            )
        os.replace(writing, path)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(
            f"The tokenizer could not be trained with a vocabulary of {vocab_size} on "
            f"{len(texts)} texts ({reason}); choose another vocabulary size."
        ) from error
    finally:
        writing.unlink(missing_ok=True)
    return Tokenizer(path)
