"""The driver for many machines: Apache Beam does what `local` does through files.

The steps are the same functions; Beam carries keys from parts to partitions and positions from
partitions to parts, in arrays, not row by row. Which machines work is Beam's business: set
``--beam=--runner=DataflowRunner,--project=…``; without it the DirectRunner works here.

Give Beam an environment of its own (beam-requirements.txt): it holds other packages back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from data_pipelines.clean import duplicates
from data_pipelines.clean.config import CleanConfig
from data_pipelines.clean.folder import Folder
from data_pipelines.clean.steps import (
    NEAR,
    ROW_BITS,
    Part,
    find_parts,
    precedence,
    prepare,
    resolve,
    scan,
    split,
    write,
)
from internvl_jax.config import ConfigError

Columns = tuple[np.ndarray, ...]


def run(config: CleanConfig, report: Callable[[str], None] = print, options: Any = None) -> Folder:
    """Cleans the corpus; parts that are written already are not written again.

    Args:
        config: of the run.
        report: gets a line at the beginning; runners have displays of their own.
        options: Beam's PipelineOptions or a list of its flags.

    Returns:
        The output folder, with counts of every part.

    Raises:
        ConfigError: if Beam is not installed, or a setting or a file is not right.
        MetadataError: if a file cannot be read.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError(
            "config.driver=beam needs Apache Beam: pip install -r "
            "data_pipelines/clean/beam-requirements.txt, in an environment of its own."
        ) from None
    parts = find_parts(config)
    folder = prepare(config, parts)
    todo = [part for part in parts if not folder.has(f"counts/{part.name}.json")]
    if not todo:
        return folder
    report(f"beam: {len(parts)} files, {len(todo)} to write")
    if not isinstance(options, PipelineOptions):
        options = PipelineOptions(list(options or []))
    with beam.Pipeline(options=options) as pipeline:
        keys = (
            pipeline
            | "parts" >> beam.Create(parts)
            | "spread parts" >> beam.Reshuffle()
            | "scan" >> beam.FlatMap(lambda part: _scan(config, part))
        )
        found = (
            keys
            | "gather keys" >> beam.GroupByKey()
            | "resolve"
            >> beam.FlatMap(lambda item: _resolve(config, *item)).with_outputs(NEAR, main="drops")
        )
        near = (
            found[NEAR]
            | "gather groups" >> beam.GroupByKey()
            | "resolve near" >> beam.FlatMap(lambda item: _near(config, *item))
        )
        # Parts are not written before all are scanned: an empty array stands for each.
        every = pipeline | "every part" >> beam.Create(
            [(part.number, ("", np.empty(0, np.uint64))) for part in todo]
        )
        by_number = {part.number: part for part in todo}
        scanned = keys | "end of scan" >> beam.combiners.Count.Globally()
        _ = (
            (found.drops, near, every)
            | "join" >> beam.Flatten()
            | "gather drops" >> beam.GroupByKey()
            | "write"
            >> beam.Map(
                lambda item, _: _write(config, by_number.get(item[0]), item[1]),
                beam.pvalue.AsSingleton(scanned),
            )
        )
    folder.remove("work")
    return folder


def _scan(config: CleanConfig, part: Part) -> Iterator[tuple[tuple[str, int], Columns]]:
    for kind, key, positions in scan(config, part, Folder(config.output)):
        for number, columns in split(key, config.duplicates.partitions, positions):
            yield (kind, number), columns


def _joined(chunks: Iterable[Columns]) -> Columns:
    return tuple(np.concatenate(columns) for columns in zip(*chunks))


def _resolve(config: CleanConfig, place: tuple[str, int], chunks: Iterable[Columns]) -> Iterator:
    from apache_beam.pvalue import TaggedOutput

    kind, _ = place
    key, positions = _joined(chunks)
    dropped, groups = resolve(config, kind, key, positions)
    yield from _by_part(kind, dropped)
    for columns in groups:
        for number, parts in split(columns[0], config.duplicates.partitions, *columns[1:]):
            yield TaggedOutput(NEAR, (number, parts))


def _near(config: CleanConfig, number: int, chunks: Iterable[Columns]) -> Iterator:
    groups, hashes, positions = _joined(chunks)
    dropped = duplicates.near(groups, hashes, positions, config.duplicates.distance)
    yield from _by_part(NEAR, dropped)


def _by_part(kind: str, positions: np.ndarray) -> Iterator[tuple[int, tuple[str, np.ndarray]]]:
    numbers, starts = np.unique(positions >> np.uint64(ROW_BITS), return_index=True)
    for number, rows in zip(numbers, np.split(positions, starts[1:])):
        yield int(number), (kind, rows)


def _write(config: CleanConfig, part: Part | None, drops: Iterable[tuple[str, np.ndarray]]) -> None:
    if part is None:  # it was written before
        return
    by_kind = sorted(drops, key=lambda drop: precedence(config).index(drop[0]) if drop[0] else -1)
    write(config, part, Folder(config.output), [(k, rows) for k, rows in by_kind if k])
