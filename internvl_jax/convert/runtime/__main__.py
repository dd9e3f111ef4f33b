"""``python -m internvl_torch``: vectors, scores, captions and dialogue from an exported folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .image import Picture

EXIT_CONFIG = 78


def parser() -> argparse.ArgumentParser:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model", metavar="DIR", type=Path, help="an exported folder (the one this code lies in)"
    )
    common.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    common.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    common.add_argument("--compile", action="store_true", help="torch.compile; slow first calls")

    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--max-new-tokens", type=int, metavar="N")
    writing.add_argument("--min-new-tokens", type=int, metavar="N")
    writing.add_argument("--beams", type=int, metavar="K", dest="num_beams", help="of the search")
    writing.add_argument("--length-penalty", type=float, metavar="X")
    writing.add_argument("--temperature", type=float, metavar="X", help="sample")
    writing.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    writing.add_argument("--top-p", type=float, metavar="P", help="sample among the share P")
    writing.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples")

    top = argparse.ArgumentParser(
        prog="python -m internvl_torch",
        description=__doc__,
        epilog="Exit status: 0 done, 78 something given could not be used.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, parents=[common, *parents])

    verb("info", "say what the folder holds and can do")
    embed = verb("embed-image", "unit vectors of pictures, one JSON list a line")
    embed.add_argument("image", nargs="+", type=Path)
    embed.add_argument("--mode", default="C", help="C, or G where the model has queries (C)")
    embed.add_argument("--out", metavar="FILE", type=Path, help="a .npy file instead: [B, E]")
    embed = verb("embed-text", "unit vectors of texts, one JSON list a line")
    embed.add_argument("text", nargs="+")
    embed.add_argument("--out", metavar="FILE", type=Path, help="a .npy file instead: [B, E]")
    score = verb("score", "how well every picture and every text fit")
    score.add_argument("--image", nargs="+", type=Path, required=True)
    score.add_argument("--text", nargs="+", required=True)
    score.add_argument("--mode", default="C", help="C, G, or ITM: the probability of a match (C)")
    caption = verb("caption", "a caption for each picture", writing)
    caption.add_argument("image", nargs="+", type=Path)
    caption.add_argument("--language", default="en", help="code, such as zh (en)")
    caption.add_argument("--prompt", help="before the caption, instead of the language's")
    chat = verb("chat", "a conversation about pictures", writing)
    chat.add_argument("--image", nargs="+", type=Path, default=[])
    chat.add_argument(
        "--prompt", action="append", help="a question; several are the turns of a conversation"
    )
    return top


def main(argv: list[str] | None = None) -> int:
    """Prints what was asked for; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        for line in lines(arguments):
            print(line, flush=True)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    return 0


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    """Loads the model, then yields the lines to print."""
    from .engine import Engine

    folder = arguments.model or Path(__file__).resolve().parents[1]
    engine = Engine.load(
        folder, device=arguments.device, dtype=arguments.dtype, compile=arguments.compile
    )
    yield from VERBS[arguments.verb](engine, arguments)


def pictures(engine: Engine, paths: list[Path]) -> list[Picture]:
    """Reads picture files; the sentence of a bad one names it."""
    found = []
    for path in paths:
        try:
            found.append(engine.decode_image(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def settings(engine: Engine, arguments: argparse.Namespace) -> Any:
    """The model's own, with what the command line changes."""
    names = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty")
    sampling = ("temperature", "top_k", "top_p")
    given = {n: getattr(arguments, n) for n in (*names, *sampling)}
    given = {n: value for n, value in given.items() if value is not None}
    if any(n in given for n in sampling):
        given = {"num_beams": 1, **given, "do_sample": True}
    engine.random.manual_seed(arguments.seed)
    return engine.settings(**given)


def _info(engine: Engine, arguments: argparse.Namespace) -> Iterator[str]:
    parameters = sum(p.numel() for p in engine.model.parameters())
    first = next(engine.model.parameters())
    yield json.dumps(
        {
            "name": engine.name,
            "kind": type(engine.config.model).__name__.removesuffix("Config").lower(),
            "abilities": sorted(engine.abilities),
            "parameters": parameters,
            "image_size": engine.image_size,
            "max_text": engine.max_text,
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
        },
        indent=2,
    )


def _vectors(rows: Any, out: Path | None) -> Iterator[str]:
    if out is None:
        yield from (json.dumps(row.tolist()) for row in rows)
        return
    import numpy as np

    with out.open("wb") as file:  # under this very name
        np.save(file, rows)
    yield f"{out} holds {rows.shape[0]} vectors of {rows.shape[1]} numbers."


def _embed_image(engine: Engine, arguments: argparse.Namespace) -> Iterator[str]:
    shown = pictures(engine, arguments.image)
    yield from _vectors(engine.embed_image(shown, arguments.mode), arguments.out)


def _embed_text(engine: Engine, arguments: argparse.Namespace) -> Iterator[str]:
    yield from _vectors(engine.embed_text(arguments.text), arguments.out)


def _score(engine: Engine, arguments: argparse.Namespace) -> Iterator[str]:
    shown = pictures(engine, arguments.image)
    for path, row in zip(arguments.image, engine.score(shown, arguments.text, arguments.mode)):
        for text, value in zip(arguments.text, row):
            yield f"{path}\t{text}\t{value:.4f}"


def _caption(engine: Engine, arguments: argparse.Namespace) -> Iterator[str]:
    how = settings(engine, arguments)
    prompt = arguments.prompt or engine.prompt(arguments.language)
    for start in range(0, len(arguments.image), 16):
        paths = arguments.image[start : start + 16]
        texts = engine.caption(pictures(engine, paths), [prompt] * len(paths), how)
        yield from (f"{path}\t{text}" for path, text in zip(paths, texts))


def _chat(engine: Engine, arguments: argparse.Namespace) -> Iterator[str]:
    how, shown = settings(engine, arguments), pictures(engine, arguments.image)
    turns: list[dict[str, str]] = []
    for question in arguments.prompt or ["What is this?"]:
        before = "<image>\n" * len(shown) if not turns else ""
        turns.append({"from": "human", "value": before + question})
        (reply,) = engine.chat([shown], [turns], how)
        turns.append({"from": "gpt", "value": reply.text})
        yield f"USER: {question}"
        yield f"ASSISTANT: {reply.text}"


VERBS = {
    "info": _info,
    "embed-image": _embed_image,
    "embed-text": _embed_text,
    "score": _score,
    "caption": _caption,
    "chat": _chat,
}

if __name__ == "__main__":
    sys.exit(main())
