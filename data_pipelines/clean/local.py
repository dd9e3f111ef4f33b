"""The driver for one machine: Arrow and NumPy, in bounded memory, resumable file by file.

Keys travel through files in the output's folder "work" (16 bytes a row and kind), one partition of
which is held in memory at a time; so memory depends on the number of partitions and workers, not
on the number of parts.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data_pipelines.clean import duplicates, spill
from data_pipelines.clean.config import CleanConfig
from data_pipelines.clean.folder import Folder
from data_pipelines.clean.progress import Progress
from data_pipelines.clean.steps import (
    NEAR,
    ROW_BITS,
    Part,
    find_parts,
    kinds,
    precedence,
    prepare,
    resolve,
    scan,
    write,
)
from internvl_jax.config import ConfigError


def run(config: CleanConfig, report: Callable[[str], None] = print) -> Folder:
    """Cleans the corpus; what is there already is not done again.

    Args:
        config: of the run.
        report: gets lines of progress.

    Returns:
        The output folder, with counts of every part.

    Raises:
        ConfigError: if a setting or a file is not right.
        MetadataError: if a file cannot be read.
    """
    parts = find_parts(config)
    folder = prepare(config, parts)
    work = _work(folder)
    wanted, partitions = kinds(config), config.duplicates.partitions
    todo = [p for p in parts if not folder.has(f"counts/{p.name}.json")]
    if todo:
        jobs = [(config, p) for p in parts if not _is_scanned(work, p, wanted)]
        _each("scan", scan_part, jobs, [p.size for _, p in jobs], config.workers, report)
        names = [p.name for p in parts]
        numbers = list(itertools.product(wanted, range(partitions)))
        jobs = [(config, names, k, n) for k, n in numbers if not _drops(work, k, n).exists()]
        _each("resolve", resolve_partition, jobs, None, config.workers, report)
        if config.duplicates.distance:
            jobs = [(config, n) for n in range(partitions) if not _drops(work, NEAR, n).exists()]
            _each("resolve near", resolve_near, jobs, None, config.workers, report)
        jobs = [(config, p) for p in todo]
        _each("write", write_part, jobs, [p.size for p in todo], config.workers, report)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def _each(
    title: str,
    function: Callable,
    jobs: Sequence[tuple],
    sizes: Sequence[int] | None,
    workers: int,
    report: Callable[[str], None],
) -> None:
    progress = Progress(title, sizes or [1] * len(jobs), report)
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            function(*job)
            progress.step()
        return
    context = multiprocessing.get_context("spawn")  # Arrow's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: Iterable = [pool.submit(function, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress.step()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _work(folder: Folder) -> pathlib.Path:
    if "file" not in folder.files.protocol:
        raise ConfigError(
            f"config.output {folder.path} is not on this machine: use --config.driver=beam, or a "
            "local folder."
        )
    return pathlib.Path(folder.at("work"))


def _keys(work: pathlib.Path, kind: str, name: str) -> pathlib.Path:
    return work / "keys" / kind / name


def _drops(work: pathlib.Path, kind: str, number: int) -> pathlib.Path:
    return work / "drops" / kind / f"{number:05d}.npy"


def _is_scanned(work: pathlib.Path, part: Part, wanted: Sequence[str]) -> bool:
    reasons = work / "reasons" / f"{part.name}.json"
    return reasons.exists() and all(spill.is_whole(_keys(work, k, part.name)) for k in wanted)


def scan_part(config: CleanConfig, part: Part) -> None:
    """Scans a part and keeps its keys."""
    folder = Folder(config.output)
    writers = {
        kind: spill.SpillWriter(_keys(_work(folder), kind, part.name), config.duplicates.partitions)
        for kind in kinds(config)
    }
    for kind, key, positions in scan(config, part, folder):
        writers[kind].add(key, positions)
    for writer in writers.values():
        writer.close()


def resolve_partition(config: CleanConfig, names: Sequence[str], kind: str, number: int) -> None:
    """Resolves one partition of one kind of keys."""
    folder = Folder(config.output)
    work = _work(folder)
    key, positions = spill.read_partition([_keys(work, kind, n) for n in names], number, 2)
    dropped, groups = resolve(config, kind, key, positions)
    if kind == "duplicate_phash" and config.duplicates.distance:
        writer = spill.SpillWriter(_keys(work, NEAR, f"{number:05d}"), config.duplicates.partitions)
        for columns in groups:
            writer.add(*columns)
        writer.close()
    folder.write_array(str(_drops(work, kind, number).relative_to(folder.path)), dropped)


def resolve_near(config: CleanConfig, number: int) -> None:
    """Compares the pictures of one partition of groups."""
    folder = Folder(config.output)
    work = _work(folder)
    sources = [_keys(work, NEAR, f"{n:05d}") for n in range(config.duplicates.partitions)]
    groups, hashes, positions = spill.read_partition(sources, number, 3)
    dropped = duplicates.near(groups, hashes, positions, config.duplicates.distance)
    folder.write_array(str(_drops(work, NEAR, number).relative_to(folder.path)), dropped)


def write_part(config: CleanConfig, part: Part) -> None:
    """Writes a part without the rows that were dropped in any partition."""
    folder = Folder(config.output)
    work = _work(folder)
    limits = np.array([part.number, part.number + 1], np.uint64) << np.uint64(ROW_BITS)
    drops = []
    for kind in precedence(config):
        for path in sorted((work / "drops" / kind).glob("*.npy")):
            positions = np.load(path, mmap_mode="r")
            first, last = np.searchsorted(positions, limits)
            if last > first:
                drops.append((kind, np.array(positions[first:last])))
    write(config, part, folder, drops)
