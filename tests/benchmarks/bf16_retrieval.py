"""What bfloat16 changes in the demo's retrieval: float32 beside it, on the same held-out pictures.

    python -m tests.benchmarks.bf16_retrieval --checkpoint runs/demo/generative

exports a stage-1 or stage-2 run in both dtypes, embeds the judged pictures and names of the
evaluation with the exported runtime, and prints for each mode and language the smallest cosine
between both dtypes' vectors, and the share of queries for which the nearest name, and whether the
right one is among the first 1 and 10, stay the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.evaluation import gallery
from data_pipelines.image import resize_square
from internvl_jax.checkpoint.storage import find_step, load_meta
from internvl_jax.config import build
from internvl_jax.convert.runtime.engine import Engine
from internvl_jax.convert.runtime.image import Picture
from internvl_jax.convert.to_torch import export_checkpoint


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    arguments = parser.parse_args()
    meta = load_meta(find_step(arguments.checkpoint)).user
    data = build(DataConfig, meta["experiment"]["data"], "data")
    shown = gallery(data, split="held_out", which="judged")
    found = {}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            export_checkpoint(arguments.checkpoint, out, format="plain", dtype=dtype)
            engine = Engine.load(out, dtype=dtype)
        S = engine.image_size
        pictures = [Picture(resize_square(image, S), S, S) for image in shown.images]
        modes = ("C", "G") if "caption" in engine.abilities else ("C",)
        images = {mode: engine.embed_image(pictures, mode) for mode in modes}
        names = {code: engine.embed_text(list(texts)) for code, texts in shown.names.items()}
        found[dtype] = images, names
    (images, names), (images16, names16) = found["float32"], found["bfloat16"]
    row = np.arange(len(shown.target))
    print("mode language  cosine  nearest  among 1  among 10   (share of queries that stay)")
    every = []
    for mode in images:
        for code in names:
            least = min(
                np.sum(images[mode] * images16[mode], axis=1).min(),
                np.sum(names[code] * names16[code], axis=1).min(),
            )
            scores = images[mode] @ names[code].T, images16[mode] @ names16[code].T
            nearest = np.mean(scores[0].argmax(1) == scores[1].argmax(1))
            ranks = [np.sum(s > s[row, shown.target][:, None], axis=1) for s in scores]
            among = [np.mean((ranks[0] < k) == (ranks[1] < k)) for k in (1, 10)]
            every.append((nearest, *among))
            print(
                f"{mode:4} {code:8}  {least:.4f}   {nearest:.4f}   {among[0]:.4f}    {among[1]:.4f}"
            )
    mean = np.mean(every, axis=0)
    print(
        f"all {len(every) * len(row):,} queries      {mean[0]:.4f}   {mean[1]:.4f}    {mean[2]:.4f}"
    )


if __name__ == "__main__":
    main()
