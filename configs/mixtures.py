"""The paper's corpora, one folder each (https://arxiv.org/abs/2312.14238, Tables 2 and 3).

A folder is what `data_pipelines.build` indexed or wrote. Without weights every record is seen
equally often: drop the parts you do not have, or add your own, and the shares follow.
"""

from __future__ import annotations

PAIRS = ("laion_en", "laion_multi", "laion_coco", "coyo", "wukong", "cc12m", "cc3m", "sbu")

LLAVA = ("mix665k",)
"""LLaVA-1.5's mixture, the paper's recipe for the model without QLLaMA (Table 23)."""

INSTRUCTIONS = (
    *("coco_caption", "textcaps"),
    *("vqav2", "okvqa", "aokvqa", "iconqa", "ai2d", "gqa"),
    *("ocrvqa", "chartqa", "docvqa", "stvqa", "estvqa", "infovqa", "llavar"),
    *("refcoco", "refcoco+", "refcocog", "toloka"),
    *("llava_150k", "svit", "visdial", "lrv", "mix665k"),
)
"""The 4 M samples of the model with QLLaMA, as `data_pipelines.dialogue` names them (Table 3)."""


def mixture(root: str, names: tuple[str, ...]) -> dict:
    """The parts of a mixture, each in a folder of its name.

    Args:
        root: folder or bucket that holds them.
        names: of the parts.

    Returns:
        What ``config.data.mixture`` takes.
    """
    return {name.replace("+", "_plus"): dict(path=f"{root}/{name}") for name in names}
