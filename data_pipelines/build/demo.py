"""Builds the demo's sets: ``python -m data_pipelines.build emoji --data_dir DIR``.

Fetches what is missing, draws, writes ArrayRecord through TFDS, trains the tokenizer on the
training concepts' texts. Done work is kept: a second run checks and returns, an interrupted one
fetches nothing twice.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator

from data_pipelines import datasets, records, text
from data_pipelines.corpus import make_corpus

VOCAB_SIZE = 8000
ATTRIBUTION = "ATTRIBUTION.md"


def build(
    name: str,
    data_dir: str | pathlib.Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    report: Callable[[str], None] = print,
) -> pathlib.Path:
    """Makes sure that a set and its tokenizer are there.

    Args:
        name: "emoji" or "shapes".
        data_dir: where sets are built; downloads are kept in ``downloads`` in it.
        vocab_size: of the tokenizer.
        report: gets lines of progress.

    Returns:
        The folder of the set.

    Raises:
        FetchError: if the emoji packages cannot be had.
        ValueError: if the set is unknown.
    """
    if name not in ("emoji", "shapes"):
        raise ValueError(f"There is no recipe for the data set {name!r}; build emoji or shapes.")
    data_dir = pathlib.Path(data_dir)
    folder = datasets.folder_of(name, data_dir)
    if not (folder / datasets.PICTURES_FILE).is_file():
        # The table of pictures is written last: without it the folder is unfinished.
        for left_over in folder.parent.glob(f"*{folder.name}"):
            shutil.rmtree(left_over)
        _emoji(data_dir, folder, report) if name == "emoji" else _shapes(data_dir, folder)
    model = datasets.tokenizer_of(name, data_dir)
    if not model.is_file():
        corpus = make_corpus(datasets.open_dataset(name, data_dir).training_concepts())
        tokenizer = text.train(corpus, model, vocab_size=vocab_size)
        report(f"{name}: tokenizer of {tokenizer.vocab_size} ids from {len(corpus)} texts")
    return folder


def _emoji(data_dir: pathlib.Path, folder: pathlib.Path, report: Callable[[str], None]) -> None:
    from data_pipelines.emoji import fetch, prepare

    started = time.monotonic()
    downloads = data_dir / "downloads" / "emoji"
    archives = fetch.fetch(downloads, report=lambda line: report(f"emoji: {line}"))
    plan = prepare.make_plan(archives)
    counts = {split: len(part) for split, part in plan.drawings.items()}
    report(f"emoji: {len(plan.concepts)} concepts, drawings {counts}")

    import tensorflow_datasets as tfds

    from data_pipelines.emoji.emoji_dataset_builder import Builder

    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    builder.plan = plan
    builder.drawn = _progress(sum(counts.values()), report)
    config = tfds.download.DownloadConfig(manual_dir=str(downloads))
    with _quiet():
        builder.download_and_prepare(download_dir=str(downloads), download_config=config)
    source = pathlib.Path(fetch.__file__).with_name(ATTRIBUTION)
    shutil.copyfile(source, folder / ATTRIBUTION)
    records.finish(folder, plan.concepts, counts)
    report(f"emoji: prepared in {folder} after {time.monotonic() - started:.0f} s")


def _shapes(data_dir: pathlib.Path, folder: pathlib.Path) -> None:
    from data_pipelines.shapes.draw import make_concepts, make_records
    from data_pipelines.shapes.shapes_dataset_builder import Builder

    builder = Builder(data_dir=str(data_dir), file_format="array_record")
    with _quiet():
        builder.download_and_prepare(download_dir=str(data_dir / "downloads"))
    counts = {split: len(part) for split, part in make_records().items()}
    records.finish(folder, make_concepts(), counts)


def _progress(total: int, report: Callable[[str], None]) -> Callable[[], None]:
    # TFDS draws from one thread, so a plain counter will do.
    started, done, shown = time.monotonic(), 0, time.monotonic()
    out = sys.stdout

    def step() -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if now - shown > 5 or done == total:
            shown = now
            left = (now - started) / done * (total - done)
            with contextlib.redirect_stdout(out):
                report(f"emoji: {done} of {total} drawings, {left:.0f} s left")

    return step


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # TFDS speaks of downloads of unknown size; what happens here is said by `report`.
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
