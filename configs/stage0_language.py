"""Stage 0, a short language-model training that stands in for the pretrained LLaMA.

The paper starts from Chinese-LLaMA-Alpaca; where those weights are at hand, import them instead.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "") -> ConfigDict:
    """Args: arg: empty for QLLaMA's decoder at full size, ``tiny`` for the tests' form."""
    if arg not in ("", "tiny"):
        raise ValueError(f"Unknown argument {arg!r}: use stage0_language.py or ...:tiny.")
    config = ConfigDict()
    config.seed = 0
    config.stage = dict(
        name="language",
        text_length=80,
        chunk=4096,
        compute=dict(dtype="bfloat16", remat="full", head_multiple=1),
        model=dict(
            vocab_size=49954,
            width=4096,
            depth=32,
            heads=32,
            mlp_dim=11008,
            cross_frequency=2,
            vision_width=0,
            pad_id=0,
        ),
    )
    config.mesh = dict(replica=1, fsdp=-1, tensor=1)
    config.optim = dict(peak_lr=3e-4, warmup=0.02, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.train = dict(
        steps=10_000,
        global_batch=4096,
        accumulate=1,
        frozen_dtype="bfloat16",
        log_every=10,
        eval_every=500,
        eval_batches=2,
        save_every=500,
        keep=2,
    )
    config.data = dict(
        dataset="data/stage0",
        tokenizer="data/tokenizer.model",
        languages=("en", "zh", "ja", "ar", "it"),
        threads=16,
    )
    if arg == "tiny":
        config.stage.update(text_length=24, chunk=64, compute=tiny.COMPUTE, model=tiny.TEXT)
        config.optim.update(peak_lr=1e-3, warmup=2.0)
        config.train.update(tiny.train())
        config.data = tiny.DATA
    return config
