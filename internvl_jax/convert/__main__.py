"""``python -m internvl_jax.convert``: weights in and out, and the proof of parity."""

from __future__ import annotations

import argparse
import sys
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
        "weights.safetensors, io.safetensors) with our model and compares. Exit status: 0 all equal "
        "within tolerance, 1 something differs or was left out, 78 a folder could not be used.",
    )
    verify.add_argument("folders", nargs="+", metavar="DIR", type=Path)
    verify.add_argument("--json", metavar="FILE", type=Path, help="write the report there as well")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    arguments = parser().parse_args(argv)
    return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from internvl_jax.config import ConfigError
    from internvl_jax.convert.case import CaseError
    from internvl_jax.convert.from_torch import WeightsError
    from internvl_jax.convert.verify import lines, verify, write_json

    reports, status = [], 0
    for folder in arguments.folders:
        try:
            report = verify(folder)
        except (CaseError, WeightsError, ConfigError) as error:
            print(error, file=sys.stderr)
            status = EXIT_CONFIG
            continue
        reports.append(report)
        print("\n".join(lines(report)), flush=True)
        if not report.passed:
            status = status or EXIT_DIFFERENT
    if arguments.json is not None:
        write_json(reports, arguments.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
