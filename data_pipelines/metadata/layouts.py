"""Which column of which source becomes which field.

A source is a row of the table `LAYOUTS`; there is no other code per source. Names are matched as
written first, then without regard to case; of several names the first that a file has is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a source writes its tables.

    Attributes:
        columns: field -> names its column has; "url" and "caption" must be there.
        header: names of the columns of a file without a header line; () where there is one.
        quoted: whether fields of a CSV or TSV file may stand in quotes.
        lang: language of all captions, "" where rows differ.
        nsfw_tag: column with "UNLIKELY", "UNSURE" or "NSFW", used where there is no `punsafe`.
    """

    columns: Mapping[str, tuple[str, ...]]
    header: tuple[str, ...] = ()
    quoted: bool = True
    lang: str = ""
    nsfw_tag: str = ""


_SIZE = {"width": ("WIDTH",), "height": ("HEIGHT",)}
_LAION = {
    "url": ("URL",),
    "caption": ("TEXT",),
    **_SIZE,
    "similarity": ("similarity",),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE"),
}
_URL_CAPTION = {"url": ("url",), "caption": ("caption",)}

LAYOUTS: dict[str, Layout] = {
    # https://laion.ai/blog/laion-5b/
    "laion_en": Layout(_LAION, lang="en", nsfw_tag="NSFW"),
    "laion_multi": Layout({**_LAION, "lang": ("LANGUAGE",)}, nsfw_tag="NSFW"),
    # https://laion.ai/blog/laion-coco/ : the generated caption that was ranked first.
    "laion_coco": Layout({**_LAION, "caption": ("top_caption",)}, lang="en"),
    # https://github.com/kakaobrain/coyo-dataset : the larger CLIP, one of two NSFW scores.
    "coyo": Layout(
        {
            "url": ("url",),
            "caption": ("text",),
            "width": ("width",),
            "height": ("height",),
            "similarity": ("clip_similarity_vitl14", "clip_similarity_vitb32"),
            "punsafe": ("nsfw_score_opennsfw2", "nsfw_score_gantman"),
            "pwatermark": ("watermark_score",),
            "aesthetic": ("aesthetic_score_laion_v2",),
            "phash": ("image_phash",),
        },
        lang="en",
    ),
    # https://wukong-dataset.github.io/wukong-dataset/
    "wukong": Layout({"url": ("url", "img_url"), "caption": ("caption",)}, lang="zh"),
    # https://ai.google.com/research/ConceptualCaptions/download
    "cc3m": Layout(_URL_CAPTION, header=("caption", "url"), quoted=False, lang="en"),
    # https://github.com/google-research-datasets/conceptual-12m : the other way round.
    "cc12m": Layout(_URL_CAPTION, header=("url", "caption"), quoted=False, lang="en"),
    # https://www.cs.rice.edu/~vo9/sbucaptions/ : one JSON object of parallel lists.
    "sbu": Layout({"url": ("image_urls", "url"), "caption": ("captions", "caption")}, lang="en"),
    # https://huggingface.co/datasets/mlfoundations/datacomp_1b
    "datacomp": Layout(
        {
            "uid": ("uid",),
            "url": ("url",),
            "caption": ("text",),
            "width": ("original_width",),
            "height": ("original_height",),
            "similarity": ("clip_l14_similarity_score", "clip_b32_similarity_score"),
            "sha256": ("sha256",),
        }
    ),
    # https://github.com/rom1504/img2dataset : its own columns and the input's that were kept.
    "img2dataset": Layout(
        {
            "uid": ("uid",),
            "url": ("url",),
            "caption": ("caption",),
            "lang": ("lang", "LANGUAGE"),
            "width": ("original_width",),
            "height": ("original_height",),
            "similarity": ("similarity",),
            "punsafe": ("punsafe",),
            "pwatermark": ("pwatermark",),
            "aesthetic": ("aesthetic", "AESTHETIC_SCORE"),
            "phash": ("phash", "image_phash"),
            "sha256": ("sha256",),
            "status": ("status",),
            "key": ("key",),
        }
    ),
}
