"""The tiny form of every stage: generated pictures, seconds on a CPU, same code paths.

``--config=configs/stage1_contrastive.py:tiny`` and so on. The data set ``shapes`` needs
``python -m data_pipelines.build shapes`` once, for its tokenizer.
"""

from __future__ import annotations

from typing import Any

VOCAB = 1374

VISION = dict(image_size=32, patch_size=8, width=64, depth=3, heads=2, mlp_dim=128)
TEXT = dict(
    vocab_size=VOCAB, width=64, depth=4, heads=4, mlp_dim=128, cross_frequency=2, vision_width=0
)
QLLAMA = dict(TEXT, vision_width=64)
LLM = dict(vocab_size=VOCAB, width=64, depth=2, heads=4, kv_heads=2, mlp_dim=128)
COMPUTE = dict(dtype="float32", remat="none", head_multiple=1)

DATA = dict(
    dataset="shapes",
    data_dir="data",
    tokenizer="data/shapes/1.0.0/tokenizer.model",
    languages=("en", "zh", "ar"),
)


def train(**changes: Any) -> dict[str, Any]:
    """A short run: 20 steps of 16 examples."""
    settings = dict(
        steps=20,
        global_batch=16,
        accumulate=1,
        frozen_dtype="float32",
        log_every=1,
        eval_every=10,
        eval_batches=1,
        save_every=10,
        keep=2,
    )
    return {**settings, **changes}
