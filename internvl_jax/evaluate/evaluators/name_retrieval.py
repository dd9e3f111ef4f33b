"""Retrieval between pictures and the names of what they show (spec of the paper's section 4.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.evaluation import Gallery
from data_pipelines.text import Tokenizer
from internvl_jax.batch import SUMMARIZE
from internvl_jax.evaluate.embed import embed_images, embed_texts
from internvl_jax.evaluate.evaluators.selection import list_name, on_list, spread
from internvl_jax.evaluate.metrics.retrieval import chance_recall, ranks, recall, top


class Embeddings(NamedTuple):
    """Unit vectors of a gallery: pictures [N, E] and, by language, names [C, E]."""

    images: np.ndarray
    names: Mapping[str, np.ndarray]


class _Task(NamedTuple):
    """One list in one language: rows of the gallery, and which of them belong together.

    Attributes:
        pictures: [n] rows of `Gallery.images`.
        names: [m] rows of `Gallery.concepts`, one for every distinct name.
        picture_label, name_label: [n], [m]; equal where the name is right.
    """

    pictures: np.ndarray
    names: np.ndarray
    picture_label: np.ndarray
    name_label: np.ndarray


@dataclasses.dataclass(frozen=True)
class NameRetrieval:
    """Picture -> name and name -> picture, zero-shot, within lists of concepts.

    A list's candidates are the distinct names of its concepts in one language. Concepts that share
    a name in a language thus have one candidate, right for all their pictures, and all of these are
    right for the name. Every distinct name with a picture is one query of name -> picture.

    Figures per list and language: ``i2t_R@k``, ``t2i_R@k``, ``chance_R@k``, ``chance_t2i_R@k``,
    ``ratio_R@k`` and ``ratio_t2i_R@k`` (how many times chance), ``n`` (pictures), ``names``.

    Attributes:
        gallery: all pictures and candidates (`data_pipelines.evaluation.gallery`, "all").
        tokenizer: of the model.
        mode: image feature, "C" or "G".
        text_length: T.
        name: of the pictures' vendor; the judged list goes by it alone, ``fluent``, the others as
            ``fluent_unseen`` and so on.
        lists: which concepts compete: judged, seen, unseen, all; an empty list is left out.
        ks: how many candidates are looked at.
        limit: at most so many pictures of each list, evenly spread; all its names still compete.
        batch_size: rows per call of the model.
    """

    gallery: Gallery
    tokenizer: Tokenizer
    mode: str
    text_length: int
    name: str = "fluent"
    lists: tuple[str, ...] = ("judged", "unseen", "all")
    ks: tuple[int, ...] = (1, 5, 10)
    limit: int | None = None
    batch_size: int = 64

    def run(self, model: Any) -> dict[str, float]:
        """Embeds and scores; `model` is an `InternVL`."""
        return self.score(self.embed(model))

    def embed(self, model: Any) -> Embeddings:
        """Unit vectors of all pictures and names."""
        names = {}
        for language, texts in self.gallery.names.items():
            rows = self.tokenizer.encode_batch([SUMMARIZE + t for t in texts], self.text_length)
            names[language] = embed_texts(model, *rows, batch_size=self.batch_size)
        images = embed_images(model, self.gallery.images, self.mode, batch_size=self.batch_size)
        return Embeddings(images, names)

    def score(self, embeddings: Embeddings) -> dict[str, float]:
        """The figures."""
        out: dict[str, float] = {}
        for which in self.lists:
            for language in self.gallery.names:
                task = self._task(which, language)
                if task is not None:
                    figures = self._figures(embeddings, language, task)
                    prefix = f"{list_name(self.name, which)}.{language}"
                    out |= {f"{prefix}.{key}": value for key, value in figures.items()}
        return out

    def _figures(self, embeddings: Embeddings, language: str, task: _Task) -> dict[str, float]:
        images = embeddings.images[task.pictures]
        names = embeddings.names[language][task.names]
        shown = np.isin(task.name_label, task.picture_label)
        out = {"n": float(len(images)), "names": float(len(names))}
        for way, mark, queries, targets, wanted, offered in (
            ("i2t", "", images, names, task.picture_label, task.name_label),
            ("t2i", "t2i_", names[shown], images, task.name_label[shown], task.picture_label),
        ):
            place = ranks(queries, targets, wanted, offered)
            for k in self.ks:
                hits, chance = recall(place, k), chance_recall(wanted, offered, k)
                out[f"{way}_R@{k}"], out[f"chance_{mark}R@{k}"] = hits, chance
                out[f"ratio_{mark}R@{k}"] = hits / chance
        return out

    def _task(self, which: str, language: str) -> _Task | None:
        concepts, target = self.gallery.concepts, self.gallery.target
        listed = np.asarray([on_list(concept, which) for concept in concepts], np.bool_)
        pictures = np.flatnonzero(listed[target])
        if not len(pictures):
            return None
        pictures = spread(pictures, self.limit)
        _, labels = np.unique(np.asarray(self.gallery.names[language]), return_inverse=True)
        candidates = np.flatnonzero(listed)
        distinct, first = np.unique(labels[candidates], return_index=True)
        return _Task(pictures, candidates[first], labels[target[pictures]], distinct)

    def examples(
        self, embeddings: Embeddings, *, which: str = "judged", count: int = 8, best: int = 3
    ) -> dict[str, list[dict[str, Any]]]:
        """What the report's grids show; pictures and names are spread evenly, not chosen by result.

        Args:
            embeddings: from `embed`.
            which: the list.
            count: pictures, and names.
            best: candidates shown.

        Returns:
            ``pictures``: each ``{record, name, languages: [{language, rank, right, names: [{text,
            right}]}]}``; ``names``: each ``{text, language, rank, pictures: [{record, right}]}``,
            the languages taking turns. ``rank`` is that of the best right candidate.
        """
        rows: dict[int, dict[str, Any]] = {}
        queries: list[dict[str, Any]] = []
        languages = list(self.gallery.names)
        for turn, language in enumerate(languages):
            task = self._task(which, language)
            if task is None:
                continue
            texts, records = self.gallery.names[language], self.gallery.records
            images, names = (
                embeddings.images[task.pictures],
                embeddings.names[language][task.names],
            )
            some = spread(np.arange(len(images)), count)
            place = ranks(images[some], names, task.picture_label[some], task.name_label)
            for i, rank, found in zip(some, place, top(images[some], names, best)[0]):
                target = self.gallery.target[task.pictures[i]]
                row = rows.setdefault(int(i), {"record": int(records[task.pictures[i]])})
                row.setdefault("name", texts[target])
                row.setdefault("languages", []).append(
                    {
                        "language": language,
                        "rank": int(rank),
                        "right": texts[target],
                        "names": [
                            {
                                "text": texts[task.names[j]],
                                "right": bool(task.name_label[j] == task.picture_label[i]),
                            }
                            for j in found
                        ],
                    }
                )
            shown = np.flatnonzero(np.isin(task.name_label, task.picture_label))
            some = spread(shown, count)[turn :: len(languages)]
            place = ranks(names[some], images, task.name_label[some], task.picture_label)
            for i, rank, found in zip(some, place, top(names[some], images, 2 * best)[0]):
                pictures = [
                    {
                        "record": int(records[task.pictures[j]]),
                        "right": bool(task.picture_label[j] == task.name_label[i]),
                    }
                    for j in found
                ]
                text = texts[task.names[i]]
                queries.append(
                    {"text": text, "language": language, "rank": int(rank), "pictures": pictures}
                )
        return {"pictures": list(rows.values()), "names": queries}
