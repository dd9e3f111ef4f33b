"""Cleaning for stage 1: six signals, mild, and exact duplicates (arXiv 2312.14238, appendix).

The paper drops only the extremes of six signals and keeps 4.98 of 6.03 billion pairs (82.6 %,
failed downloads included). It gives no threshold: **all numbers here are ours**. The sources'
scores come from different models, so some have thresholds of their own.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: none."""
    if arg:
        raise ValueError(f"Unknown argument {arg!r}: it takes none.")
    config = ConfigDict()
    config.stage = 1
    config.output = "data/clean_stage1"
    # Of a pair that two sources have, the earlier one's stays: curated ones first.
    config.order = (
        *("sbu", "cc3m", "cc12m", "wukong"),
        *("laion_coco", "coyo", "laion_en", "laion_multi"),
    )
    config.sources = dict(
        sbu=dict(files="data/metadata/sbu/*.json"),
        cc3m=dict(files="data/metadata/cc3m/*.tsv"),
        cc12m=dict(files="data/metadata/cc12m/*.tsv"),
        wukong=dict(files="data/metadata/wukong/*.csv"),
        laion_coco=dict(files="data/metadata/laion_coco/*.parquet"),
        # COYO's similarity is of ViT-L/14, whose cosines are lower than ViT-B/32's.
        coyo=dict(files="data/metadata/coyo/*.parquet", signals=dict(similarity=0.16)),
        laion_en=dict(files="data/metadata/laion_en/*.parquet"),
        laion_multi=dict(files="data/metadata/laion_multi/*.parquet"),
    )
    config.signals = dict(
        similarity=0.24,
        watermark=0.9,
        unsafe=0.9,
        aesthetic=3.5,
        side=64,
        aspect=3.0,
        least_chars=3,
        most_chars=1000,
    )
    config.captions = dict()
    config.language = dict(keep=(), identifier="", model="")
    # Write the list with `python -m data_pipelines.clean.decontaminate`.
    config.contamination = dict(list="", distance=2)
    config.duplicates = dict(keys=("url",), distance=0, bands=4, partitions=256)
    config.duplicates.update(captions_of=(), caption_count=config_dict.placeholder(int))
    config.drop_uids = ()
    config.malformed = 0.01
    config.driver = "local"
    config.workers = 1
    config.examples = 3
    return config
