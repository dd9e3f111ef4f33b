"""A loaded folder behind one class: pictures and texts in, vectors and words out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .chat import InternVLChat
from .config import IMAGE_PLACEHOLDER, ChatConfig, Config, DecoderConfig, InternVLConfig
from .decoder import Decoder
from .generate import Generated, Settings, Start, Writer, left_pad, start
from .image import Picture, normalize, picture
from .internvl import InternVL, unit
from .load import load
from .text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without spaces around it.
        prompt_tokens: positions of the prompt, visual tokens included.
        new_tokens: of the answer, its end included.
        finish: ``stop`` where the model ended it, ``length`` at `Settings.max_new_tokens`.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str


class Engine:
    """A loaded model and what it can do. Methods take batches; they are not thread-safe.

    Attributes:
        name: of the model.
        abilities: of ``embed_image``, ``embed_text``, ``score``, ``caption``, ``chat``.
        image_size: side S of the pictures in pixels; 0 for a model that sees none.
        max_text: tokens of a text that is embedded (the rest is cut off), or that the dialogue
            model was trained on.
    """

    ROWS = 64
    """Most rows that are computed at once when many are embedded or scored."""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
    ) -> Engine:
        """Loads an exported folder.

        Args:
            folder: with config.json, the weights and the tokenizer.
            device: as torch names it; a GPU where there is one by default.
            dtype: ``float32``, ``bfloat16`` or ``float16``; by default float32 on a CPU, else that
                of the files.
            compile: let ``torch.compile`` make the vision tower and the step of generation faster;
                the first calls of each shape then take a minute or so.

        Raises:
            FolderError: if the folder is damaged or incomplete.
        """
        config, model = load(folder, device=device, dtype=dtype)
        text = config.text
        tokenizer = Tokenizer(folder, text) if text and text.tokenizer else None
        return cls(config, model, tokenizer, compile=compile)

    def __init__(
        self, config: Config, model: nn.Module, tokenizer: Tokenizer | None, compile: bool = False
    ):
        self.config, self.model = config, model
        self._tokenizer = tokenizer
        self.name = config.name
        self.image_size = config.image.size if config.image else 0
        self.max_text = config.text.length if config.text else 0
        self.abilities = _abilities(config, tokenizer is not None)
        self.device = next(model.parameters()).device
        self.random = torch.Generator(self.device)
        """What samples are drawn from: ``engine.random.manual_seed(0)`` repeats them."""
        self._compiled = compile
        llm = {InternVLConfig: "qllama", ChatConfig: "language_model", DecoderConfig: ""}
        name = llm.get(type(config.model))
        decoder: Any = None if name is None else model.get_submodule(name)
        self._writer = None if decoder is None else Writer(decoder, compile)
        if compile and config.image is not None:
            tower: nn.Module = getattr(model, "vision_model", model)
            tower.compile()

    def settings(self, **changes: Any) -> Settings:
        """The model's own generation settings, some of them changed."""
        text = self.config.text
        ids = {"eos_id": text.eos_id, "pad_id": text.pad_id} if text else {}
        return Settings(**{**self.config.generation, **ids, **changes})

    def prompt(self, language: str = "en") -> str:
        """What stands before a caption in a language. Raises ValueError for an unknown one."""
        self._needs("caption")
        prompts = self.config.text.prompts if self.config.text else {}
        if language not in prompts:
            raise ValueError(
                f"{self.name} has no prompt for the language {language!r}: choose from "
                f"{', '.join(prompts) or 'none'}."
            )
        return prompts[language]

    def decode_image(self, data: bytes) -> Picture:
        """A picture file as the model sees it (safe to call from several threads).

        Raises:
            ValueError: one sentence, if it is no picture or too large.
        """
        if self.config.image is None:
            raise ValueError(f"{self.name} sees no pictures.")
        return picture(data, self.config.image)

    @torch.inference_mode()
    def embed_image(self, pictures: list, mode: str = "C") -> np.ndarray:
        """Features of pictures.

        Args:
            pictures: B of `decode_image`.
            mode: ``"C"``, or ``"G"`` where the model has queries. A bare vision tower gives its CLS
                token.

        Returns:
            float32 [B, E], unit rows.
        """
        self._needs("embed_image")
        self._has_mode(mode)
        return self._in_parts(pictures, lambda part: self._image_features(part, mode)).numpy()

    @torch.inference_mode()
    def embed_text(self, texts: list[str]) -> np.ndarray:
        """Features of texts, the same in both modes: float32 [B, E], unit rows."""
        self._needs("embed_text")
        return self._in_parts(texts, self._text_features).numpy()

    @torch.inference_mode()
    def score(self, pictures: list, texts: list[str], mode: str = "C") -> np.ndarray:
        """How well every picture and every text fit.

        Args:
            pictures: B of `decode_image`.
            texts: M texts.
            mode: ``"C"`` or ``"G"``: similarity logits; ``"ITM"``: the probability of a match,
                slower, as the model reads every pair.

        Returns:
            float32 [B, M].
        """
        self._needs("score")
        self._has_mode(mode)
        model: Any = self.model
        if mode != "ITM":
            image = self._in_parts(pictures, lambda part: self._image_features(part, mode))
            text = self._in_parts(texts, self._text_features)
            scale = model.logit_scale.float().exp().cpu()
            return (scale * (image @ text.T)).numpy()
        result = np.zeros((len(pictures), len(texts)), np.float32)
        for i, shown in enumerate(pictures):
            vision = model.image_tokens(self._pixels([shown]))
            match = lambda part: self._match(vision, part)  # noqa: B023
            result[i] = self._in_parts(texts, match).numpy()
        return result

    @torch.inference_mode()
    def caption(self, pictures: list, prompts: list[str], settings: Settings) -> list[str]:
        """Captions.

        Args:
            pictures: B of `decode_image`.
            prompts: B texts that stand before the captions, such as `prompt` gives.
            settings: how to search.

        Returns:
            B captions.
        """
        self._needs("caption")
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: give one each.")
        if not pictures:
            return []
        rows = [self._fits(self.tokenizer.prompt(prompt)) for prompt in prompts]
        ids, mask = self._padded(rows)
        model: Any = self.model
        begun = model.read(self._pixels(pictures), ids, mask)
        return [text for text, *_ in self._written(begun, settings)]

    @torch.inference_mode()
    def chat(
        self,
        pictures: list[list],
        conversations: list[list[dict]],
        settings: Settings,
    ) -> list[Reply]:
        """Answers.

        Args:
            pictures: of each conversation, in the order of its ``<image>`` placeholders.
            conversations: B lists of turns ``{"from": "human" | "gpt", "value": text}``.
            settings: how to search.

        Raises:
            ValueError: if turns do not alternate or pictures and placeholders are not as many.
        """
        self._needs("chat")
        if len(pictures) != len(conversations):
            raise ValueError(
                f"{len(conversations)} conversations and {len(pictures)} lists of pictures: give "
                "one each."
            )
        if not conversations:
            return []
        rows = [self._row(*pair) for pair in zip(pictures, conversations)]
        ids, mask = self._padded(rows)
        shown = [one for some in pictures for one in some]
        model = self.model
        if isinstance(model, InternVLChat):
            begun = model.read(self._pixels(shown) if shown else None, ids, mask)
        else:
            assert isinstance(model, Decoder)
            begun = start(model, model.embed(ids), mask)
        return [
            Reply(text.strip(), len(row), new, finish)
            for row, (text, new, finish) in zip(rows, self._written(begun, settings))
        ]

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's. Raises ValueError where it has none."""
        if self._tokenizer is None:
            raise ValueError(f"{self.name} was exported without a tokenizer: it reads no texts.")
        return self._tokenizer

    def _needs(self, ability: str) -> None:
        if ability not in self.abilities:
            raise ValueError(
                f"{self.name} cannot {ability}: it can {', '.join(sorted(self.abilities))}."
            )

    def _has_mode(self, mode: str) -> None:
        model = self.config.model
        queries = isinstance(model, InternVLConfig) and model.queries
        known = ("C", "G", "ITM") if queries else ("C",)
        if mode not in known:
            raise ValueError(f"{self.name} has no mode {mode!r}: choose from {', '.join(known)}.")

    def _in_parts(
        self, items: Sequence[Any], function: Callable[[Sequence[Any]], Tensor]
    ) -> Tensor:
        """Rows of a function of at most `ROWS` items at a time, on the host."""
        if not items:
            return torch.zeros(0, getattr(self.config.model, "embed_dim", 0))
        parts = [items[i : i + self.ROWS] for i in range(0, len(items), self.ROWS)]
        return torch.cat([function(part).cpu() for part in parts])

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """Normalised float32 [B, S, S, 3] on the device."""
        pixels = torch.from_numpy(np.stack([shown.pixels for shown in pictures]))
        assert self.config.image is not None
        return normalize(pixels.to(self.device, non_blocking=True), self.config.image)

    def _image_features(self, pictures: Sequence[Picture], mode: str) -> Tensor:
        pixels, model = self._pixels(pictures), self.model
        if isinstance(model, InternVL):
            return unit(model.image_embedding(model.image_tokens(pixels), mode))
        return unit(model(pixels)[0][:, 0])

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        prefix = self.tokenizer.config.prefix
        ids, lengths = (t.to(self.device) for t in self.tokenizer.rows(texts, prefix))
        model: Any = self.model
        return unit(model.text_embedding(ids, lengths))

    def _match(self, vision: Tensor, texts: Sequence[str]) -> Tensor:
        # Without the prefix, as the matching rows of training stand.
        ids, lengths = (t.to(self.device) for t in self.tokenizer.rows(texts))
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        model: Any = self.model
        return model.match_logits(vision, ids, mask).softmax(dim=-1)[:, 1]

    def _row(self, pictures: Sequence[Any], turns: Sequence[Mapping[str, Any]]) -> list[int]:
        asked = sum(str(turn["value"]).count(IMAGE_PLACEHOLDER) for turn in turns)
        if asked != len(pictures):
            raise ValueError(
                f"A conversation has {len(pictures)} pictures but {asked} times "
                f"{IMAGE_PLACEHOLDER}."
            )
        model = self.config.model
        if pictures and not isinstance(model, ChatConfig):
            raise ValueError(f"{self.name} sees no pictures.")
        visual = model.visual_tokens(self.image_size) if isinstance(model, ChatConfig) else 0
        return self._fits(self.tokenizer.conversation(turns, visual))

    def _fits(self, row: list[int]) -> list[int]:
        # Short rows of captions may well begin with a longer prompt; nothing needs a thousand.
        most = max(self.max_text, 1024)
        if len(row) > most:
            raise ValueError(
                f"A prompt has {len(row)} tokens, visual ones included: {self.name} takes {most}."
            )
        return row

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        multiple = 64 if self._compiled else 1
        ids, mask = left_pad(rows, self.tokenizer.config.pad_id, multiple)
        return ids.to(self.device), mask.to(self.device)

    def _written(self, begun: Start, settings: Settings) -> list[tuple[str, int, str]]:
        """Text, number of tokens and end of every continuation."""
        text = self.tokenizer.config
        settings = dataclasses.replace(
            settings, eos_id=text.eos_id, pad_id=text.pad_id, bos_id=None
        )
        assert self._writer is not None
        out: Generated = self._writer(begun, settings, self.random)
        rows = [row[:n] for row, n in zip(out.ids.tolist(), out.lengths.tolist())]
        return [
            (self.tokenizer.decode(row), len(row), "stop" if row[-1] == text.eos_id else "length")
            for row in rows
        ]


def _abilities(config: Config, texts: bool) -> frozenset[str]:
    model = config.model
    if isinstance(model, InternVLConfig):
        found = {"embed_image"} | ({"embed_text", "score"} if texts else set())
        writes = model.queries and (model.qllama.head or model.qllama.tied_head)
        return frozenset(found | ({"caption"} if texts and writes else set()))
    if isinstance(model, ChatConfig | DecoderConfig):
        return frozenset({"chat"} if texts else set())
    return frozenset({"embed_image"})
