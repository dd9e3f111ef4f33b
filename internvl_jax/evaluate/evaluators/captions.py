"""Generated captions: names and keywords in the language that the prompt asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.evaluation import Gallery
from data_pipelines.text import Tokenizer
from internvl_jax.batch import caption_prompt
from internvl_jax.evaluate.embed import in_batches
from internvl_jax.evaluate.evaluators.selection import spread, thin
from internvl_jax.evaluate.metrics.answers import hit_rate, normalize, parts
from internvl_jax.generate.prompt import caption, left_pad
from internvl_jax.generate.settings import Settings


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions after prompts such as "Italian caption:", scored as names and as keywords.

    Exact: the caption is the concept's name. Keyword: the name or one of the concept's keywords is
    among the caption's comma-separated items. Beside each stand two levels that need no picture
    (`metrics.answers.HitRate`): the same captions shuffled over the pictures (``chance_…``), and
    the best constant caption (``constant_…``).
    Figures per language: ``caption_exact``, ``caption_keyword``, each also with ``chance_`` and
    ``constant_`` in front, and ``caption_n``.

    Attributes:
        gallery: pictures and what they show.
        tokenizer: of the model.
        name: of the list.
        beams: width of the beam search; 1 is greedy.
        max_new_tokens: most tokens of a caption.
        limit: at most so many pictures, evenly spread.
        batch_size: pictures per call of the model.
    """

    gallery: Gallery
    tokenizer: Tokenizer
    name: str = "fluent"
    beams: int = 1
    max_new_tokens: int = 24
    limit: int | None = None
    batch_size: int = 64

    def run(self, model: Any) -> dict[str, float]:
        """`model` is an `InternVL` with queries."""
        return self.score(self.captions(model))

    def captions(self, model: Any) -> dict[str, list[str]]:
        """Language -> the caption of every picture."""
        tokenizer, images = self.tokenizer, thin(self.gallery, self.limit).images
        settings = Settings(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
        languages = list(self.gallery.names)
        prompts = [[tokenizer.bos_id, *tokenizer.ids(caption_prompt(code))] for code in languages]
        # All prompts in one width: the search compiles once.
        rows = left_pad(prompts, tokenizer.pad_id)

        def generate(images: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Any:
            return caption(model, images, ids, mask, settings)

        out = {}
        for language, ids, mask in zip(languages, *rows):
            prompt = (np.tile(row, (len(images), 1)) for row in (ids, mask))
            new = in_batches(generate, (images, *prompt), self.batch_size)
            out[language] = [tokenizer.decode(row).strip() for row in new]
        return out

    def score(self, captions: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """The figures, from what `captions` returns."""
        out: dict[str, float] = {}
        for language, texts in captions.items():
            names, accepted = self._accepted(language)
            exact = hit_rate([{normalize(t)} - {""} for t in texts], [{n} for n in names])
            keyword = hit_rate([parts(t) for t in texts], accepted)
            prefix = f"{self.name}.{language}"
            out[f"{prefix}.caption_n"] = float(len(texts))
            for kind, hits in (("exact", exact), ("keyword", keyword)):
                out[f"{prefix}.caption_{kind}"] = hits.rate
                out[f"{prefix}.chance_caption_{kind}"] = hits.shuffled
                out[f"{prefix}.constant_caption_{kind}"] = hits.constant
        return out

    def examples(
        self, captions: Mapping[str, Sequence[str]], *, count: int = 6
    ) -> list[dict[str, Any]]:
        """What the report shows, pictures spread evenly.

        Args:
            captions: from `captions`.
            count: pictures.

        Returns:
            Each ``{record, name, captions: [{language, text, right, verdict}]}``, the verdict
            "name", "keyword" or "".
        """
        pictures, out = thin(self.gallery, self.limit), []
        for i in map(int, spread(np.arange(len(pictures.images)), count)):
            shown = []
            for language, texts in captions.items():
                names, accepted = self._accepted(language)
                verdict = "keyword" if parts(texts[i]) & accepted[i] else ""
                verdict = "name" if normalize(texts[i]) == names[i] else verdict
                right = pictures.names[language][pictures.target[i]]
                shown.append(
                    {"language": language, "text": texts[i], "right": right, "verdict": verdict}
                )
            record = int(pictures.records[i])
            out.append({"record": record, "name": shown[0]["right"], "captions": shown})
        return out

    def _accepted(self, language: str) -> tuple[list[str], list[frozenset[str]]]:
        """Of every picture the normalised name, and what counts as a keyword."""
        shown = thin(self.gallery, self.limit)
        concepts = [shown.concepts[i] for i in shown.target]
        names = [normalize(concept.names[language]) for concept in concepts]
        keywords = [
            frozenset({name, *map(normalize, concept.keywords.get(language, ()))})
            for name, concept in zip(names, concepts)
        ]
        return names, keywords
