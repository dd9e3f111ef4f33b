"""Look at what a stage is fed: ``python -m data_pipelines.inspect --config=configs/FILE.py[:arg]``.

Draws a page of examples as the model will see them: pictures after cropping and resizing, every
token of every row, what of it is learned, and which records were bad. Settings are changed with
--config.data.name=value, as for training.
"""

from __future__ import annotations

import base64
import html
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from data_pipelines.config import as_data_config
from data_pipelines.drawing import BadRecordsError
from data_pipelines.image import encode_png
from data_pipelines.mixture import Drawn
from data_pipelines.pipeline import (
    HostBatch,
    Pipeline,
    make_pipeline,
    open_tokenizer,
)
from data_pipelines.text import Tokenizer
from internvl_jax.batch import IGNORE, IMAGE_TOKEN
from internvl_jax.config import ConfigError, run

BAD_RECORDS = 65
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; color: #222 }
h1 { font-size: 1.4rem } table { border-collapse: collapse } th { font-weight: 600 }
td, th { padding: .1rem .8rem .1rem 0; text-align: left } td.n, th.n { text-align: right }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1rem }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .8rem; overflow-wrap: anywhere }
.card.bad { border-color: #c33 } .card img { width: 112px; margin: 0 4px 4px 0 }
.number { color: #777 } .bad .number { color: #c33 }
.row { margin-top: .5rem } .name { color: #777; font-size: 12px }
.t { background: #eee; border-radius: 2px; margin-right: 1px; padding: 0 1px }
.t.odd { background: #dbe6f2 } .t.learned { background: #cdeac0 } .t.special { color: #a33 }
.t.image { background: #333; color: #fff; padding: 0 4px } .pads { color: #999 }
"""


def page(
    pipeline: Pipeline, tokenizer: Tokenizer, *, title: str, step: int, examples: int, steps: int
) -> str:
    """Draws the examples of one step.

    Args:
        pipeline: of one host.
        tokenizer: that its rows were made with.
        title: heading of the page.
        step: which.
        examples: how many at most.
        steps: of the run, for how often it sees what.

    Returns:
        A page that needs no other file.

    Raises:
        BadRecordsError: if an example cannot be made.
    """
    batch = pipeline.batch(step)
    count = min(examples, len(batch.records))
    cards = "".join(_card(batch, i, tokenizer) for i in range(count))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}, step {step}</h1>"
        f"{_parts(pipeline.drawn(steps), steps)}{_summary(batch)}<p>Learned tokens are "
        "<span class='t learned'>green</span>; the texts of a row, where it holds several, "
        "alternate in colour.</p>"
        f"<div class=grid>{cards}</div></html>"
    )


def _parts(parts: Iterable[Drawn], steps: int) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(part.name)}<td class=n>{part.records:,}<td class=n>"
        f"{part.examples:,}<td class=n>{part.times:.3g}"
        for part in parts
    )
    head = "<tr><th>part<th class=n>units<th class=n>examples<th class=n>each seen, times"
    return f"<p>In {steps:,} steps:</p><table>{head}{rows}</table>"


def _summary(batch: HostBatch) -> str:
    bad = ", ".join(f"{html.escape(name)} {count}" for name, count in batch.reasons.items())
    said = [f"{len(batch.records)} examples, bad records: {bad or 'none'}"]
    for name, ids in batch.arrays.items():
        used = _used(batch, name)
        if used is not None:
            said.append(f"{name}: {100 * used.mean():.0f} % of {ids.shape[1]} tokens used")
    if "labels" in batch.arrays:
        share = (batch.arrays["labels"] != IGNORE).mean()
        said.append(f"{100 * share:.0f} % learned")
    return f"<p>{'; '.join(said)}.</p>"


def _used(batch: HostBatch, name: str) -> np.ndarray | None:
    """[B,T] where a row has tokens; None for what is no row of tokens."""
    arrays = batch.arrays
    if f"{name}_mask" in arrays:
        return arrays[f"{name}_mask"]
    return arrays["segment"] > 0 if name == "text" and "segment" in arrays else None


def _card(batch: HostBatch, i: int, tokenizer: Tokenizer) -> str:
    arrays = batch.arrays
    pictures = []
    if "image" in arrays:
        image = arrays["image"][i]
        pictures = [slot for slot in (image if image.ndim == 4 else image[None]) if slot.any()]
    shown = "".join(
        f"<img alt='' src='data:image/png;base64,{base64.b64encode(encode_png(p)).decode()}'>"
        for p in pictures
    )
    valid = bool(batch.valid[i])
    note = "" if valid else ", in place of a bad one"
    rows = "".join(
        f"<div class=row><div class=name>{name}</div>{_tokens(batch, name, i, used, tokenizer)}"
        "</div>"
        for name in arrays
        if (used := _used(batch, name)) is not None
    )
    return (
        f"<div class='card{'' if valid else ' bad'}'><div class=number>{i}: record "
        f"{batch.records[i]}{note}</div>{shown}{rows}</div>"
    )


def _tokens(batch: HostBatch, name: str, i: int, used: np.ndarray, tokenizer: Tokenizer) -> str:
    ids, labels = batch.arrays[name][i], batch.arrays.get("labels")
    segment = batch.arrays.get("segment")
    out, visual = [], 0
    for t in range(int(used[i].sum()) + 1):
        here = t < int(used[i].sum())
        if here and ids[t] == IMAGE_TOKEN:
            visual += 1
            continue
        if visual:
            out.append(f"<span class='t image'>picture × {visual}</span>")
            visual = 0
        if not here:
            break
        kinds = ["t"]
        kinds += ["learned"] if name == "text" and labels is not None and labels[i, t] >= 0 else []
        kinds += ["odd"] if segment is not None and segment[i, t] % 2 == 0 else []
        kinds += ["special"] if ids[t] in (tokenizer.bos_id, tokenizer.eos_id) else []
        piece = html.escape(tokenizer.piece(int(ids[t]))).replace("\n", "⏎")
        out.append(f"<span class='{' '.join(kinds)}'>{piece}</span>")
    pads = len(ids) - int(used[i].sum())
    return "".join(out) + (f" <span class=pads>+ {pads} pads</span>" if pads else "")


def _main(config: Any, flags: Any) -> int:
    # Here alone the data asks what trains on it: the page must be what the run will see.
    from internvl_jax.train.experiment import resolve

    experiment = resolve(config)
    batch = experiment.train.global_batch
    phases = experiment.schedule()
    stage = next((stage for until, stage in phases if flags.step < until), phases[-1][1])
    data = experiment.data_config(stage)
    # The slice of as many hosts as leave one the examples that are asked for, or few more.
    most = max(batch // flags.examples, 1)
    hosts = max(count for count in range(1, most + 1) if batch % count == 0)
    try:
        pipeline = make_pipeline(
            data,
            stage.name,
            global_batch=batch,
            seed=experiment.seed,
            split=flags.split,
            process_count=hosts,
        )
        text = page(
            pipeline,
            open_tokenizer(as_data_config(data)),
            title=f"{stage.name}, {flags.split}",
            step=flags.step,
            examples=flags.examples,
            steps=experiment.train.steps,
        )
        pathlib.Path(flags.out).write_text(text, "utf-8")
    except BadRecordsError as error:
        print(error, file=sys.stderr)
        return BAD_RECORDS
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    print(f"saved {flags.out}")
    return 0


def _fill(config: Any) -> Any:
    from internvl_jax.train.experiment import completed

    return completed(config)


def _flags(flags: Any) -> None:
    flags.DEFINE_integer("examples", 24, "How many to draw.", lower_bound=1)
    flags.DEFINE_integer("step", 0, "Of which step.", lower_bound=0)
    flags.DEFINE_enum("split", "train", ["train", "validation"], "Of which split.")
    flags.DEFINE_string("out", "inspect.html", "Where the page goes.")


if __name__ == "__main__":
    run(_main, _flags, _fill)
