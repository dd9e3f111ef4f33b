"""The command line of ``python -m data_pipelines.build``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from data_pipelines.build import demo
from internvl_jax.batch import LANGUAGES, TEMPLATES

DONE, BAD_RECORDS, CONFIGURATION = 0, 65, 78
ROLES = ("image", "caption", "language", "key", "conversations")


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb.

    Args:
        arguments: instead of those of the process.

    Returns:
        The exit code: 0 done, 65 too much of the input is bad, 78 something is missing or wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        from data_pipelines.build.index import TooManyBadError

        print(f"{options.verb}: {error}", file=sys.stderr)
        return BAD_RECORDS if isinstance(error, TooManyBadError) else CONFIGURATION


def _parser() -> argparse.ArgumentParser:
    import data_pipelines.build

    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.build",
        description=data_pipelines.build.__doc__,
        formatter_class=plain,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str):
        added = verbs.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    for name in ("emoji", "shapes"):
        added = verb(name, _demo, f"the demo's set {name!r} and its tokenizer")
        added.add_argument("--data_dir", default="data", help="where sets are built")
        added.add_argument(
            "--vocab_size", type=int, default=demo.VOCAB_SIZE, help="of the tokenizer"
        )

    added = verb("index", _index, "count and index the files of a set where they lie")
    added.add_argument("folder", help="with tars, ArrayRecord, parquet, or prepared by TFDS")
    added.add_argument("--out", default="", help="folder of manifest and indexes, if not that one")
    added.add_argument("--format", choices=("tar", "array_record", "parquet"), default="")
    added.add_argument(
        "--digest", choices=("ends", "full"), default="ends",
        help="of a file: of its size and ends, or of every byte",
    )  # fmt: skip
    _shared(added, 0.01, "files", "field (of a tar: extension; json/NAME is an entry of the json)")

    added = verb(
        "convert", _convert, "a table with picture files, or an indexed set, to ArrayRecord"
    )
    added.add_argument("table", help=".csv .tsv .json .jsonl .parquet, or the folder of a set")
    added.add_argument("--images", default="", help="folder of the pictures (default: the table's)")
    added.add_argument("--out", required=True, help="folder to write to")
    added.add_argument("--records", type=int, default=10_000, help="of a file")
    added.add_argument("--validation", type=float, default=0.0, help="share kept apart, by key")
    _shared(added, 0.05, "records", "column")

    added = verb("tokenizer", _tokenizer, "train a tokenizer on a set, for a model of your own")
    added.add_argument("folder", help="of the manifest")
    added.add_argument("--vocab_size", type=int, default=demo.VOCAB_SIZE, help="most ids")

    added = verb("lengths", _lengths, "measure conversations, so that data.pack can join them")
    added.add_argument("folder", help="of the manifest")
    added.add_argument("--tokenizer", required=True, help="the model's tokenizer.model")
    added.add_argument("--template", default="vicuna_v1", choices=sorted(TEMPLATES))

    added = verb("verify", _verify, "compare the files of a set with its manifest")
    added.add_argument("folder", help="of the manifest")
    added.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def _shared(parser: argparse.ArgumentParser, bad: float, of: str, what: str) -> None:
    for role in ROLES:
        more = "; =en: all are in English" if role == "language" else ""
        parser.add_argument(f"--{role}", default="", help=f"{what} of the {role}{more}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--max_bad", type=float, default=bad, help=f"greatest share of bad {of}")


def _names(options: argparse.Namespace) -> dict[str, str]:
    names = {role: getattr(options, role) for role in ROLES if getattr(options, role)}
    language = names.get("language", "")
    if language.startswith("=") and language[1:] not in LANGUAGES:
        raise ValueError(f"--language {language} is none of ={', ='.join(LANGUAGES)}.")
    return names


def _demo(options: argparse.Namespace) -> int:
    folder = demo.build(options.verb, options.data_dir, vocab_size=options.vocab_size)
    print(f"{options.verb}: ready in {folder}")
    return DONE


def _index(options: argparse.Namespace) -> int:
    from data_pipelines.build.index import index

    written = index(
        options.folder,
        options.out,
        format=options.format,
        names=_names(options),
        digest=options.digest,
        workers=options.workers,
        max_bad=options.max_bad,
    )
    _say(written)
    return DONE


def _convert(options: argparse.Namespace) -> int:
    from data_pipelines.build.convert import Indexed, convert, told
    from data_pipelines.build.tables import open_table
    from data_pipelines.sources import storage

    names = _names(options)
    if storage.is_remote(options.table) or os.path.isdir(options.table):
        from data_pipelines.manifest import open_corpus

        if names:
            raise ValueError(
                f"{options.table} is a set; its fields are named when it is indexed: python -m "
                "data_pipelines.build index."
            )
        input = Indexed(options.table, open_corpus(options.table).kind)
    else:
        language = names.get("language", "")
        if language.startswith("="):
            del names["language"]
        images = options.images or os.path.dirname(options.table) or "."
        input = open_table(options.table, images, names, language.removeprefix("="))
    written, reasons = convert(
        input,
        options.out,
        records=options.records,
        validation=options.validation,
        workers=options.workers,
        max_bad=options.max_bad,
    )
    _say(written)
    if reasons:
        print(f"skipped: {told(reasons)}; {options.out}/skipped.jsonl lists them")
    return DONE


def _tokenizer(options: argparse.Namespace) -> int:
    from data_pipelines.build.texts import train_tokenizer

    tokenizer = train_tokenizer(options.folder, options.vocab_size)
    print(f"{tokenizer.path}: {tokenizer.vocab_size} ids")
    return DONE


def _lengths(options: argparse.Namespace) -> int:
    from data_pipelines.build.texts import write_lengths

    path, lengths = write_lengths(options.folder, options.tokenizer, options.template)
    used = lengths[lengths[:, 0] > 0]
    tokens, pictures = used.mean(axis=0) if len(used) else (0, 0)
    print(
        f"{path}: {len(used):,} of {len(lengths):,} conversations can be used, on average "
        f"{tokens:.0f} tokens and {pictures:.2f} pictures"
    )
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from data_pipelines.build.verify import verify

    wrong = verify(options.folder, workers=options.workers)
    print(f"{options.folder}: {len(wrong)} problems" if wrong else f"{options.folder}: all is well")
    return BAD_RECORDS if wrong else DONE


def _say(written: dict) -> None:
    for folder, manifest in written.items():
        print(
            f"{folder}: {manifest.records:,} {manifest.kind} in {manifest.shards:,} files, "
            f"{manifest.bytes / 1e9:.2f} GB"
        )
