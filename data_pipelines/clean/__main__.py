"""``python -m data_pipelines.clean --config=configs/clean_stage1.py --config.output=data/clean1``.

Reads the tables of the sources, drops what the rules and the other rows say, and writes what is
kept as parquet in one schema, lists of its uids, and a report. Started again it goes on where it
ended. Settings are changed with --config.name=value, e.g. --config.order="('cc3m','sbu')".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from data_pipelines.clean.config import CleanConfig
from internvl_jax.config import ConfigError, build, run

DONE, TOO_MANY_BAD = 0, 65


def clean(config: CleanConfig, beam_flags: Sequence[str] = ()) -> int:
    """Cleans, reports, and says with the exit code whether too much was malformed."""
    from data_pipelines.clean.report import as_table, make_report

    started = time.monotonic()
    if config.driver == "beam":
        from data_pipelines.clean import beam

        folder = beam.run(config, options=beam_flags)
    else:
        from data_pipelines.clean import local

        folder = local.run(config)
    report = make_report(config, folder)
    print(as_table(report))
    print(f"\n{config.output}/report.html, after {time.monotonic() - started:.0f} s")
    whole = report["sources"]["all"]
    malformed = whole["dropped"].get("malformed", 0)
    if malformed > config.malformed * whole["rows"]:
        print(
            f"{malformed} of {whole['rows']} lines could not be parsed, more than "
            f"config.malformed={config.malformed} allows: check the readers of the sources.",
            file=sys.stderr,
        )
        return TOO_MANY_BAD
    return DONE


def _main(config: Any, flags: Any) -> int:
    from data_pipelines.metadata.read import MetadataError

    try:
        return clean(build(CleanConfig, config), flags.beam)
    except (MetadataError, OSError) as error:
        raise ConfigError(str(error)) from error


def _flags(flags: Any) -> None:
    flags.DEFINE_list("beam", [], "Flags of Beam, e.g. --runner=FlinkRunner,--parallelism=8.")


if __name__ == "__main__":
    run(_main, _flags)
