"""Cleaning for stage 2: rules on the captions (arXiv 2312.14238, appendix).

The paper keeps 1.03 of 6.03 billion pairs (17.0 %): 91 M of LAION-en, 100 M of LAION-multi and
200 M of COYO, and all that stage 1 kept of the others, whose captions were curated or generated.
So the caption rules hold for those three sources. **All numbers and patterns are ours.**
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

WEB = ("laion_en", "laion_multi", "coyo")


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: none."""
    stage1 = runpy.run_path(str(Path(__file__).with_name("clean_stage1.py")))
    config = stage1["get_config"](arg)
    config.stage = 2
    config.output = "data/clean_stage2"
    config.captions = dict(
        least=10,
        most=256,
        complete=True,
        letters=0.6,
        gibberish=True,
        boilerplate=True,
        repetition=0.4,
        offensive=True,
        offensive_words=(),
        placeholders=True,
        code=True,
    )
    off = dict(
        least=None,
        most=None,
        complete=False,
        letters=None,
        gibberish=False,
        boilerplate=False,
        repetition=None,
        offensive=False,
        placeholders=False,
        code=False,
    )
    for name in config.sources:
        if name not in WEB:
            config.sources[name].captions = off
    # Web captions that match their picture well and that people like to look at.
    for name, similarity in (("laion_en", 0.32), ("laion_multi", 0.32), ("coyo", 0.24)):
        config.sources[name].signals = dict(similarity=similarity, watermark=0.5, aesthetic=5.0)
    config.duplicates.caption_count = 10
    config.duplicates.captions_of = WEB
    return config
