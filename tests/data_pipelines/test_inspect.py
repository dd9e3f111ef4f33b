"""The page shows what is in the batch: every token, what is learned, every picture."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.inspect import page
from data_pipelines.pipeline import make_pipeline
from internvl_jax.batch import IGNORE, STAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_shows_every_token(stage, tokenizer_path, tokenizer):
    config = {
        "dataset": "shapes",
        "tokenizer": str(tokenizer_path),
        "image_size": 16,
        "text_length": 160,
        "visual_tokens": 4,
    }
    pipeline = make_pipeline(config, stage, global_batch=8, seed=0)
    text = page(pipeline, tokenizer, title="A < B", step=3, examples=6, steps=7)
    batch = pipeline.batch(3)
    assert "A &lt; B, step 3" in text and "bad records: none" in text
    assert text.count("class='card'") == 6
    assert text.count("<img") == (0 if stage == "language" else 6)
    assert f"<td class=n>{7 * 8:,}" in text
    for i, card in enumerate(text.split("class='card'")[1:]):
        row = card.split("<div class=name>text</div>")[1].split("</div>")[0]
        said = re.findall(r"<span class='t([^']*)'>([^<]*)</span>", row)
        ids = batch.arrays["text"][i]
        count = (
            int((batch.arrays["segment"][i] > 0).sum())
            if stage == "finetune"
            else int(batch.arrays["text_mask"][i].sum())
        )
        words = [
            html.unescape(piece).replace("⏎", "\n") for kind, piece in said if "image" not in kind
        ]
        shown = [tokenizer.piece(int(token)) for token in ids[:count] if token >= 0]
        assert words == shown
        if "labels" in batch.arrays:
            learned = int((batch.arrays["labels"][i] != IGNORE).sum())
            assert sum("learned" in kind for kind, _ in said) == learned > 0
        if stage == "finetune":
            assert "picture × 4" in row
        assert f"+ {160 - count} pads" in row


def test_the_command(tokenizer_path, tmp_path):
    out = tmp_path / "page.html"
    config = ROOT / "configs" / "stage1_contrastive.py"
    command = [sys.executable, "-m", "data_pipelines.inspect", f"--config={config}:tiny"]
    command += [f"--out={out}", "--examples=3", "--config.train.global_batch=24"]
    command += ["--config.stage.model.qllama.vocab_size=700"]
    command += [f"--config.data.tokenizer={tokenizer_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = lambda *more: subprocess.run(
        [*command, *more], env=environment, capture_output=True, text=True
    )
    done = run()
    assert done.returncode == 0, done.stderr
    assert out.read_text("utf-8").count("class='card'") == 3
    # A setting that the file leaves to its default is changed as for training.
    refused = run("--config.data.resize=fill")
    assert refused.returncode == 78 and "data.resize must be one of" in refused.stderr
    refused = run("--config.data.dataset=nowhere")
    assert refused.returncode == 78 and "nowhere" in refused.stderr
    assert "Traceback" not in refused.stderr
