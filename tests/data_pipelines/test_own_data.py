"""From a table and pictures to batches, by the commands of the documentation."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines import build
from data_pipelines.pipeline import make_pipeline
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IMAGE_TOKEN


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (40, 30), (4 * i, 0, 255 - 4 * i)).save(folder / f"{i}.jpg")
    return folder


def command(*arguments) -> int:
    return build.main([str(argument) for argument in arguments])


def test_captions_from_a_table(pictures, tmp_path, capsys):
    table, out = tmp_path / "captions.csv", tmp_path / "mine"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        writer.writerows([f"{i}.jpg", f"a picture with the number {i}"] for i in range(60))
    assert command("convert", table, "--images", pictures, "--out", out, "--validation", 0.2) == 0
    assert command("tokenizer", out, "--vocab_size", 320) == 0
    assert "320 ids" in capsys.readouterr().out
    config = {"dataset": str(out), "image_size": 16, "text_length": 40}
    tokenizer = Tokenizer(out / "tokenizer.model")
    seen = []
    for split in ("train", "validation"):
        pipeline = make_pipeline(config, "contrastive", global_batch=60, seed=0, split=split)
        count = pipeline.drawn(1)[0].records
        batch = pipeline.batch(0)
        assert batch.valid.all() and len(set(batch.records[:count])) == count
        for text, image in zip(batch.arrays["text"][:count], batch.arrays["image"]):
            number = int(tokenizer.decode(text).split()[-1])
            np.testing.assert_allclose(image[8, 8], (4 * number, 0, 255 - 4 * number), atol=3)
            seen.append(number)
    assert sorted(seen) == list(range(60))


def test_conversations_packed(pictures, tmp_path, capsys, tokenizer_path):
    talks = [
        {
            "id": f"t{i}",
            **({"image": f"{i}.jpg"} if i % 3 else {}),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if i % 3 else "") + f"Which number? {i}"},
                {"from": "gpt", "value": f"{i}" * (1 + i % 5)},
            ],
        }
        for i in range(60)
    ]
    table, out = tmp_path / "talks.json", tmp_path / "talks"
    table.write_text(json.dumps(talks))
    assert command("convert", table, "--images", pictures, "--out", out) == 0
    config = {
        "dataset": str(out),
        "tokenizer": str(tokenizer_path),
        "image_size": 16,
        "text_length": 256,
        "visual_tokens": 9,
        "image_slots": 4,
        "crop_scale": (),
        "resize": "pad",
        "pack": True,
    }
    with pytest.raises(ValueError, match=r"run python -m data_pipelines\.build lengths .*talks"):
        make_pipeline(config, "finetune", global_batch=4, seed=0)
    assert command("lengths", out, "--tokenizer", tokenizer_path) == 0
    assert "60 of 60 conversations can be used" in capsys.readouterr().out
    pipeline = make_pipeline(config, "finetune", global_batch=4, seed=0)
    rows = pipeline.drawn(1)[0].records
    assert rows < 40
    talked, visual = 0, 0
    for step in range(-(-rows // 4)):
        arrays = pipeline.batch(step).arrays
        for place in range(min(4, rows - 4 * step)):
            talked += arrays["segment"][place].max()
            visual += (arrays["text"][place] == IMAGE_TOKEN).sum()
            shown = arrays["image"][place].any(axis=(1, 2, 3)).sum()
            assert (arrays["text"][place] == IMAGE_TOKEN).sum() == 9 * shown
    assert talked == 60 and visual == 9 * 40
    other = tmp_path / "other.model"
    other.write_bytes(io.BytesIO(tokenizer_path.read_bytes()).read()[:-1])
    assert command("lengths", out, "--tokenizer", other) == 78
