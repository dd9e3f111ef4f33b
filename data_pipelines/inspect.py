"""Look at what a stage is fed: ``python -m data_pipelines.inspect contrastive --out sheet.png``.

Prints the texts of some batches and saves their pictures as a contact sheet; each picture bears
its number in the print and its concept's English name. ``vendors`` shows every vendor's drawing of
some concepts side by side instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.config import DataConfig
from data_pipelines.datasets import Dataset, open_dataset, tokenizer_of
from data_pipelines.image import decode, resize_square
from data_pipelines.pipeline import make_pipeline
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IGNORE, STAGES

CELL, LINE = 96, 14


def contact_sheet(pictures: list[np.ndarray], titles: list[str], columns: int = 8) -> Image.Image:
    """Lays pictures out in rows with a line of text below each.

    Args:
        pictures: [S,S,3] uint8 each.
        titles: one for each.
        columns: pictures in a row.

    Returns:
        The sheet.
    """
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (CELL + 4), rows * (CELL + LINE + 4)), "lightgray")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (pixels, title) in enumerate(zip(pictures, titles)):
        left, top = i % columns * (CELL + 4) + 2, i // columns * (CELL + LINE + 4) + 2
        image = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
        sheet.paste(image, (left, top))
        # Pillow's own font has no other scripts.
        pen.text((left, top + CELL), title.encode("ascii", "replace")[:18], "black", font)
    return sheet


def show_vendors(dataset: Dataset, count: int, start: int) -> Image.Image:
    """Every drawing of some concepts, one concept a row.

    Args:
        dataset: the set.
        count: concepts.
        start: the first one.

    Returns:
        The sheet.
    """
    vendors = sorted(set(dataset.vendor))
    pictures, titles = [], []
    for number in range(start, min(start + count, len(dataset.concepts))):
        drawn = {dataset.vendor[r]: int(r) for r in np.flatnonzero(dataset.concept == number)}
        for vendor in vendors:
            blank = np.full((CELL, CELL, 3), 128, np.uint8)
            found = vendor in drawn
            pictures.append(decode(dataset.pictures[drawn[vendor]]) if found else blank)
            titles.append(f"{vendor[:3]} {dataset.concepts[number].names.get('en', '')}")
    return contact_sheet(pictures, titles, columns=2 * len(vendors))


def show_stage(config: DataConfig, stage: str, batches: int, seed: int, split: str):
    """Prints a stage's texts and collects its pictures.

    Args:
        config: the data settings.
        stage: one of `STAGES`.
        batches: of eight examples.
        seed: of the pipeline.
        split: "train" or "validation".

    Returns:
        The sheet, or None for a stage of texts alone.
    """
    dataset = open_dataset(config.dataset, config.data_dir)
    path = config.tokenizer or tokenizer_of(config.dataset, config.data_dir)
    tokenizer = Tokenizer(path)
    pipeline = make_pipeline(config, stage, global_batch=8, seed=seed, split=split)
    pictures, titles = [], []
    for step in range(batches):
        host = pipeline.batch(step)
        for i, record in enumerate(host.records):
            number = step * 8 + i
            concept = record if stage == "language" else dataset.concept[record]
            vendor = "" if stage == "language" else dataset.vendor[record]
            print(f"{number} record {record} {vendor} {dataset.concepts[concept].key}")
            for name, values in host.arrays.items():
                if values.dtype == np.int32 and values.ndim == 2:
                    row = values[i]
                    used = int(np.count_nonzero(row != tokenizer.pad_id))
                    shown = row[row != IGNORE] if name == "labels" else row
                    count = len(shown) if name == "labels" else used
                    print(f"    {name:10} {count:3} {tokenizer.decode(shown)!r}")
            if "image" in host.arrays:
                pixels = host.arrays["image"][i]
                pictures.append(resize_square(pixels[0] if pixels.ndim == 4 else pixels, CELL))
                titles.append(f"{number} {dataset.concepts[concept].names.get('en', '')}")
    return contact_sheet(pictures, titles) if pictures else None


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: instead of those of the process.

    Returns:
        The exit code: 0 done, 78 if something is missing or wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.inspect", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "vendors"))
    parser.add_argument("--dataset", default="emoji")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--tokenizer", default="", help="default: the one built with the set")
    parser.add_argument("--image_size", type=int, default=40)
    parser.add_argument("--text_length", type=int, default=0, help="default: 24, finetune 160")
    parser.add_argument("--visual_tokens", type=int, default=4)
    parser.add_argument("--split", default="train", choices=("train", "validation"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=4, help="of eight examples (or concepts)")
    parser.add_argument("--start", type=int, default=0, help="first concept of vendors")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("contact_sheet.png"))
    options = vars(parser.parse_args(arguments))
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    options["text_length"] = options["text_length"] or (
        160 if options["stage"] == "finetune" else 24
    )
    try:
        config = DataConfig(**{name: options[name] for name in fields & options.keys()})
        if options["stage"] == "vendors":
            dataset = open_dataset(config.dataset, config.data_dir)
            sheet = show_vendors(dataset, options["batches"] * 8, options["start"])
        else:
            stage, batches = options["stage"], options["batches"]
            sheet = show_stage(config, stage, batches, options["seed"], options["split"])
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{options['dataset']}: {error}", file=sys.stderr)
        return 78
    if sheet is not None:
        sheet.save(options["out"])
        print(f"saved {options['out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
