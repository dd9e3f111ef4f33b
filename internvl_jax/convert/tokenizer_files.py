"""Special ids of an exported model's vocabulary, and the tokenizer's files beside its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from internvl_jax.convert.formats import About, Files
from internvl_jax.convert.from_torch import WeightsError

IMAGE_CONTEXT = "<IMG_CONTEXT>"
CHAT_TEMPLATE = "chat_template.jinja"
# LLaMA's sentencepiece files; data_pipelines reads no others.
UNK, BOS, EOS = ("<unk>", 0), ("<s>", 1), ("</s>", 2)


@dataclasses.dataclass(frozen=True)
class Special:
    """Pieces with a meaning of their own, as (text, id); `bos` is None where there is none.

    `image` stands where visual tokens are spliced in. A vocabulary of the InternVL family has
    ``<IMG_CONTEXT>`` for it. LLaMA's has nothing of the kind, and a new id would need a new row of
    the embedding; its ``<unk>`` is free instead: with byte fallback no text is ever encoded to it.
    """

    bos: tuple[str, int] | None
    eos: tuple[str, int]
    image: tuple[str, int]


def special(about: About) -> Special:
    """The special pieces of an exported model.

    The stage's ``image_token_id``, where it is set, wins over what the vocabulary offers.

    Raises:
        WeightsError: if the tokenizer cannot be read or has no piece that could stand for an image.
    """
    found = Special(BOS, EOS, UNK)
    if about.tokenizer is not None:
        read = _READERS.get(about.tokenizer.suffix)
        if read is None:
            raise WeightsError(
                f"{about.tokenizer} is no tokenizer that is known here: give a sentencepiece "
                "tokenizer.model or a tokenizer.json."
            )
        try:
            found = read(about.tokenizer)
        except WeightsError:
            raise
        except (OSError, ValueError, RuntimeError, AttributeError, TypeError, LookupError) as error:
            raise WeightsError(f"{about.tokenizer} cannot be read as one: {error}") from None
    chosen = about.stage.get("image_token_id")
    if chosen is None:
        return found
    return dataclasses.replace(found, image=(_piece(about.tokenizer, chosen), chosen))


def tokenizer_files(about: About, **further: Any) -> Files:
    """The tokenizer's file under the name transformers looks for, and tokenizer_config.json.

    Args:
        about: its `tokenizer`; without one there are no files.
        further: entries of tokenizer_config.json.

    Raises:
        WeightsError: as `special`.
    """
    if about.tokenizer is None:
        return {}
    pieces = special(about)
    model = about.tokenizer.suffix == ".model"
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if model else "PreTrainedTokenizerFast",
        "bos_token": pieces.bos and pieces.bos[0],
        "eos_token": pieces.eos[0],
        "unk_token": UNK[0] if model else None,
        # Never the image piece: padding would be counted as pictures.
        "pad_token": pieces.eos[0],
        "add_bos_token": pieces.bos is not None,
        "add_eos_token": False,
        # A space before every piece of text that follows a special token, as in training.
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **further,
    }
    content = (json.dumps(config, indent=2) + "\n").encode()
    files: Files = {"tokenizer_config.json": content}
    files["tokenizer.model" if model else "tokenizer.json"] = about.tokenizer
    if model and (added := _added(about.tokenizer)).is_file():
        files[added.name] = added
    return files


def _sentencepiece(path: Path) -> Special:
    model, added = _processor(path), _added(path)
    image = model.piece_to_id(IMAGE_CONTEXT)
    if added.is_file():
        image = json.loads(added.read_text()).get(IMAGE_CONTEXT, image)
    if image == model.unk_id():
        return Special(BOS, EOS, UNK)
    return Special(BOS, EOS, (IMAGE_CONTEXT, image))


def _added(path: Path) -> Path:
    """Where transformers keeps the pieces that were added to a sentencepiece file."""
    return path.with_name("added_tokens.json")


def _processor(path: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _fast(path: Path) -> Special:
    ids = _pieces(path)
    unk = json.loads(path.read_text()).get("model", {}).get("unk_token")

    def first(*names: str | None) -> tuple[str, int] | None:
        return next(((n, ids[n]) for n in names if n in ids), None)

    eos, image = first("<|im_end|>", "</s>", "<|endoftext|>"), first(IMAGE_CONTEXT, unk)
    if eos is None or image is None:
        what = "end-of-text token" if eos is None else f"{IMAGE_CONTEXT} and no unknown token"
        raise WeightsError(
            f"{path} has no {what}: set image_token_id to an id that no text is encoded to, or "
            "export as plain."
        )
    return Special(first("<s>"), eos, image)


def _pieces(path: Path) -> dict[str, int]:
    parsed = json.loads(path.read_text())
    vocab = parsed.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram models: [piece, score]
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    return {**vocab, **{t["content"]: t["id"] for t in parsed.get("added_tokens", ())}}


def _piece(path: Path | None, number: int) -> str:
    """The text of an id."""
    if path is None:
        return IMAGE_CONTEXT
    if path.suffix == ".model":
        try:
            return _processor(path).id_to_piece(number)
        except IndexError:
            return IMAGE_CONTEXT
    return next((piece for piece, i in _pieces(path).items() if i == number), IMAGE_CONTEXT)


_READERS = {".model": _sentencepiece, ".json": _fast}
