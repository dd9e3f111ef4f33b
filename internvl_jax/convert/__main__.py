"""``python -m internvl_jax.convert``: weights in and out, and the proof of parity."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_DIFFERENT = 1
EXIT_CONFIG = 78


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m internvl_jax.convert", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    verify = verbs.add_parser(
        "verify",
        help="compare our models with stored outputs of the official ones",
        description="Computes every stored output of reference folders (config.json, "
        "weights.safetensors, io.safetensors) with our model and compares. Exit status: 0 all "
        "within tolerance, 1 something differs or was left out, 78 a folder could not be used.",
    )
    verify.add_argument("folders", nargs="+", metavar="DIR", type=Path)
    verify.add_argument("--json", metavar="FILE", type=Path, help="write the report there as well")
    export = verbs.add_parser(
        "export",
        help="write a checkpoint's model for PyTorch",
        description="Writes the model of a run, or of imported weights, as a folder of "
        "safetensors with index, config, checksums and a model card. Exit status: 0 written, 78 "
        "nothing was written.",
    )
    export.add_argument("checkpoint", metavar="CKPT", help="a run's folder, or one step's")
    export.add_argument("destination", metavar="DEST", type=Path)
    export.add_argument(
        "--format",
        choices=("official", "hf-native", "remote-code", "plain", "stage1"),
        default="official",
        help="official: InternVL-14B's names, of which a stage-1 model fills its part. plain: a "
        "folder that serves itself with torch and safetensors. hf-native: for transformers' own "
        "InternVL class, vLLM and LMDeploy. remote-code: InternVLChatModel's names. stage1: the "
        "names of the plain stage-1 file (official)",
    )
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(as stored)")
    export.add_argument("--shard-size", metavar="SIZE", type=_bytes, default="5GB", help="(5GB)")
    export.add_argument("--step", type=int, help="which step (the newest)")
    export.add_argument("--ema", action="store_true", help="take the averaged parameters")
    export.add_argument(
        "--adapters",
        action="store_true",
        help="write the adapters of a :lora run alone, in PEFT's form (they are merged otherwise)",
    )
    export.add_argument("--tokenizer", metavar="FILE", type=Path, help="(the run's)")
    export.add_argument("--overwrite", action="store_true", help="replace an export in DEST")
    into = verbs.add_parser(
        "import",
        help="make a checkpoint of official weights",
        description="Recognises official weights by their config and names, checks every name and "
        "shape, and writes a checkpoint that a run starts from. Exit status: 0 written, 78 nothing "
        "was written.",
    )
    into.add_argument("source", metavar="SOURCE", help="a folder of weights, or one file")
    into.add_argument("destination", metavar="DEST", help="work directory to create")
    into.add_argument(
        "--as",
        dest="part",
        choices=("vision", "qllama", "llm"),
        help="what a tower or a decoder alone shall be: qllama is the text tower of stage 1 "
        "(vision, llm)",
    )
    into.add_argument("--image-size", type=int, help="resize the position table for such pictures")
    into.add_argument("--vocab-size", type=int, help="add words: each the mean of the old ones")
    into.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(as stored)")
    into.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DEST")
    return top


def _bytes(text: str) -> int:
    """``5GB``, ``200MB`` -> bytes."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}
    number = text.upper().rstrip("GMKB")
    unit = text.upper().removeprefix(number)
    if unit not in units or not number.isdigit() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write for example 5GB or 200MB")
    return int(number) * units[unit]


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.verb == "verify":
        return _verify(arguments)
    return _copying(_export if arguments.verb == "export" else _import, arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from internvl_jax.convert.case import CaseError
    from internvl_jax.convert.from_torch import WeightsError
    from internvl_jax.convert.verify import lines, verify, write_json

    reports, status = [], 0
    for folder in arguments.folders:
        try:
            report = verify(folder)
        except ValueError as error:
            named = isinstance(error, CaseError | WeightsError)
            print(error if named else f"{folder}: {error}", file=sys.stderr)
            status = EXIT_CONFIG
            continue
        reports.append(report)
        print("\n".join(lines(report)), flush=True)
        if not report.passed:
            status = status or EXIT_DIFFERENT
    if arguments.json is not None:
        try:
            write_json(reports, arguments.json)
        except OSError as error:
            print(f"The report cannot be written: {error}.", file=sys.stderr)
            status = EXIT_CONFIG
    return status


def _copying(verb: Callable[[argparse.Namespace], list[str]], arguments: argparse.Namespace) -> int:
    """Prints what a verb says, or the sentence with which it refuses."""
    import jax

    # No accelerator is needed, and another process may hold it.
    jax.config.update("jax_platforms", "cpu")
    from internvl_jax.checkpoint import CheckpointError
    from internvl_jax.config import ConfigError
    from internvl_jax.convert.shards import WeightsError

    try:
        print("\n".join(verb(arguments)))
    except (CheckpointError, ConfigError, WeightsError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _export(arguments: argparse.Namespace) -> list[str]:
    from internvl_jax.convert.to_torch import export_checkpoint

    left_out = export_checkpoint(
        arguments.checkpoint,
        arguments.destination,
        step=arguments.step,
        ema=arguments.ema,
        format=arguments.format,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
        tokenizer=arguments.tokenizer,
        adapters=arguments.adapters,
        overwrite=arguments.overwrite,
        quiet=False,
    )
    without = [f"{path} has no name in this format and was left out." for path in left_out]
    return [f"{arguments.destination} is written.", *without]


def _import(arguments: argparse.Namespace) -> list[str]:
    from internvl_jax.convert.importing import import_weights

    found = import_weights(
        arguments.source,
        arguments.destination,
        part=arguments.part,
        image_size=arguments.image_size,
        vocab_size=arguments.vocab_size,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        quiet=False,
    )
    kind = type(found.cfg).__name__.removesuffix("Config")
    return [
        f"{arguments.destination} is written: {kind}, {len(found.tensors):,} tensors, "
        f"{found.cfg.param_count():,} parameters."
    ]


if __name__ == "__main__":
    sys.exit(main())
