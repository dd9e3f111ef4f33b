"""``python -m internvl_jax.generate``: captions and dialogue from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import numpy as np

    from data_pipelines.text import Tokenizer
    from internvl_jax.generate.settings import Settings
    from internvl_jax.models.internvl import InternVL
    from internvl_jax.models.internvl_chat import InternVLChat

EXIT_CONFIG = 78
WIDTH = 16
"""Prompts are padded to a multiple of it: a longer conversation seldom compiles anew."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m internvl_jax.generate",
        description="Captions pictures with a checkpoint of the generative stage, one line each; "
        "with one of the finetune stage, holds a conversation about all of them.",
        epilog="The paper's captions: --prompt 'English caption:' --beams 5 --max-new-tokens 30 "
        "--min-new-tokens 8. Exit status: 0 done, 78 something given could not be used.",
    )
    what = top.add_argument_group("what")
    what.add_argument("--checkpoint", metavar="DIR", required=True, help="a run's folder")
    what.add_argument("--tokenizer", metavar="FILE", required=True, help="its tokenizer.model")
    what.add_argument("--image", metavar="PATH", nargs="+", type=Path, default=[])
    what.add_argument(
        "--prompt",
        action="append",
        help="before the caption ('English caption:' by default), or a question to the chat model; "
        "several: every caption once for each, or the turns of the conversation",
    )
    what.add_argument("--step", type=int, help="which checkpoint (the newest)")
    what.add_argument("--ema", action="store_true", help="use the averaged parameters")
    what.add_argument("--dtype", choices=("float32", "bfloat16"), help="to compute in (the run's)")
    how = top.add_argument_group("how")
    how.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    how.add_argument("--min-new-tokens", type=int, default=0, metavar="N")
    how.add_argument("--beams", type=int, default=1, metavar="K", help="width of the beam search")
    how.add_argument("--length-penalty", type=float, default=1.0, metavar="X")
    how.add_argument("--temperature", type=float, metavar="X", help="sample; greedy without these")
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    how.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest share P")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples")
    return top


def main(argv: list[str] | None = None) -> int:
    """Prints what the model says; returns the exit status."""
    arguments = parser().parse_args(argv)
    from data_pipelines.image import BadImageError
    from internvl_jax.checkpoint import CheckpointError, CheckpointMismatch

    try:
        for line in lines(arguments):
            print(line, flush=True)
    except (CheckpointError, CheckpointMismatch, BadImageError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    return 0


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    """Loads everything, then yields the lines to print."""
    import jax
    import numpy as np

    from data_pipelines.image import RESIZES, BadImageError, decode
    from data_pipelines.text import Tokenizer
    from internvl_jax import pretrained
    from internvl_jax.generate.settings import Settings
    from internvl_jax.models.internvl import InternVL
    from internvl_jax.models.internvl_chat import InternVLChat

    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    sampling = {n: x for n, x in (sampling | {"top_p": arguments.top_p}).items() if x is not None}
    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        num_beams=arguments.beams,
        length_penalty=arguments.length_penalty,
        do_sample=bool(sampling),
        **sampling,
    )
    pixels = []
    for path in arguments.image:
        try:
            pixels.append(decode(path.read_bytes()))
        except BadImageError as error:
            raise BadImageError(error.reason, f"{path}: {error}") from None

    stage, model, meta = pretrained.load(
        arguments.checkpoint, step=arguments.step, dtype=arguments.dtype, ema=arguments.ema
    )
    data = meta.get("experiment", {}).get("data", {})
    resize = RESIZES[data.get("resize", "square")]
    images = np.zeros((len(pixels), stage.image_size, stage.image_size, 3), np.uint8)
    for i, picture in enumerate(pixels):
        images[i] = resize(picture, stage.image_size, resample="exact")
    key = jax.random.key(arguments.seed)
    if isinstance(model, InternVLChat):
        tokenizer = Tokenizer(arguments.tokenizer, vocab_size=model.cfg.llm.vocab_size)
        questions = arguments.prompt or ["What is this?"]
        template = data.get("template", "vicuna_v1")
        for question, answer in converse(
            model, tokenizer, images, questions, settings, key, template=template
        ):
            yield f"USER: {question}"
            yield f"ASSISTANT: {answer}"
    elif isinstance(model, InternVL) and model.cfg.queries:
        if not pixels:
            raise ValueError("There is nothing to caption: give --image.")
        tokenizer = Tokenizer(arguments.tokenizer, vocab_size=model.cfg.qllama.vocab_size)
        for prompt in arguments.prompt or ["English caption:"]:
            texts = describe(model, tokenizer, images, prompt, settings, key)
            yield from (f"{p}\t{prompt}\t{text}" for p, text in zip(arguments.image, texts))
    else:
        raise ValueError(
            f"{arguments.checkpoint} is of the {stage.name} stage, whose model writes nothing: "
            "give a checkpoint of the generative or the finetune stage."
        )


def describe(
    model: InternVL,
    tokenizer: Tokenizer,
    images: np.ndarray,
    prompt: str,
    settings: Settings,
    key: jax.Array,
) -> list[str]:
    """One caption for each of the uint8 pictures [B, S, S, 3]."""
    from internvl_jax.generate.prompt import caption, left_pad

    row = [tokenizer.bos_id, *tokenizer.ids(prompt)]
    ids, mask = left_pad([row] * len(images), tokenizer.pad_id)
    settings = _with_ids(settings, tokenizer)
    return [tokenizer.decode(new) for new in caption(model, images, ids, mask, settings, key)]


def converse(
    model: InternVLChat,
    tokenizer: Tokenizer,
    images: np.ndarray,
    questions: list[str],
    settings: Settings,
    key: jax.Array,
    *,
    template: str = "vicuna_v1",
) -> Iterator[tuple[str, str]]:
    """A conversation about uint8 pictures [M, S, S, 3], shown before the first question.

    Yields:
        Each question with its answer, which becomes part of the next prompt.
    """
    import jax

    from internvl_jax.batch import IMAGE_PLACEHOLDER, template_named, tokenize
    from internvl_jax.generate.prompt import chat, left_pad

    turns: list[dict[str, Any]] = []
    for turn, question in enumerate(questions):
        shown = f"{IMAGE_PLACEHOLDER}\n" * len(images) if turn == 0 else ""
        turns.append({"from": "human", "value": shown + question})
        row, _ = tokenize(
            template_named(template).segments(turns),
            tokenizer.ids,
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            visual_tokens=model.cfg.visual_tokens(images.shape[1]),
        )
        ids, mask = left_pad([row], tokenizer.pad_id, multiple=WIDTH)
        pictures = images[None] if len(images) else None
        here = jax.random.fold_in(key, turn)
        new = chat(model, pictures, ids, mask, _with_ids(settings, tokenizer), here)
        turns.append({"from": "gpt", "value": tokenizer.decode(new[0]).strip()})
        yield question, turns[-1]["value"]


def _with_ids(settings: Settings, tokenizer: Tokenizer) -> Settings:
    import dataclasses

    return dataclasses.replace(settings, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


if __name__ == "__main__":
    sys.exit(main())
