"""Measures conversations so that they can be packed: ``python -m data_pipelines.lengths FOLDER``.

Writes a small file beside the corpus that ``data.pack`` reads. It holds for one tokenizer and one
template; a corpus may have several.
"""

from __future__ import annotations

import argparse
import io
import sys
import time

from internvl_jax.batch import TEMPLATES


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: instead of those of the process.

    Returns:
        The exit code: 0 done, 78 if something is missing or wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.lengths", description=__doc__)
    parser.add_argument("folder", help="of a corpus of conversations")
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.model")
    parser.add_argument("--template", default="vicuna_v1", choices=sorted(TEMPLATES))
    options = parser.parse_args(arguments)
    try:
        path = _write(options.folder, options.tokenizer, options.template)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 78
    print(f"saved {path}")
    return 0


def _write(folder: str, tokenizer_path: str, template: str) -> str:
    import numpy as np

    from data_pipelines.config import DataConfig
    from data_pipelines.sets.corpus import CorpusSet
    from data_pipelines.sets.packed import lengths_file, measure
    from data_pipelines.sources import storage
    from data_pipelines.text import Tokenizer

    tokenizer = Tokenizer(tokenizer_path)
    corpus = CorpusSet.open(folder, "finetune", "train")
    started = shown = time.monotonic()

    def report(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > 5:
            shown, rate = now, done / (now - started)
            left = (len(corpus) - done) / rate
            print(f"{done} of {len(corpus)}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr)

    config = DataConfig(dataset=folder, template=template, text_length=1 << 20)
    lengths = measure(corpus, config, tokenizer, report)
    used = int((lengths[:, 0] > 0).sum())
    tokens = int(lengths[:, 0].sum())
    print(
        f"{used} of {len(lengths)} conversations can be used: {tokens / max(used, 1):.0f} tokens "
        f"and {lengths[:, 1].sum() / max(used, 1):.2f} pictures each"
    )
    path = storage.join(folder, lengths_file(corpus, template, tokenizer))
    data = io.BytesIO()
    np.save(data, lengths)
    storage.write(path, data.getvalue())
    return path


if __name__ == "__main__":
    sys.exit(main())
