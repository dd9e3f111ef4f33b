"""Compares the files of a set with its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import sys

import numpy as np

from data_pipelines import manifest as manifests
from data_pipelines.build.index import count_records
from data_pipelines.build.work import Progress, run
from data_pipelines.sources import BadShardError, storage


@dataclasses.dataclass(frozen=True)
class _Job:
    path: str
    index_path: str
    format: str
    digest: str
    shard: manifests.Shard


def verify(folder: str, *, workers: int = 1) -> list[str]:
    """Reads digests and counts again.

    Args:
        folder: of the manifest, local or a URL.
        workers: processes.

    Returns:
        What is wrong, a sentence each.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if it is damaged.
    """
    corpus = manifests.open_corpus(folder)
    manifest, table = corpus.manifest, corpus.shards
    packed = storage.read(storage.join(folder, manifests.TABLE))
    found = hashlib.sha256(packed).hexdigest()
    if found != manifest.table_sha256 or np.any(np.diff(table.ends, prepend=0) <= 0):
        raise ValueError(
            f"{folder}: {manifests.TABLE} is not the one that {manifests.MANIFEST} was written "
            "with; index the folder again."
        )
    jobs = (
        _Job(table.path(i), table.index_path(i), manifest.format, manifest.digest, table.shard(i))
        for i in range(len(table))
    )
    wrong, records, progress = [], 0, Progress(f"verify {folder}", "records")
    for done, (job, problem) in enumerate(run(jobs, check_shard, workers), 1):
        if problem:
            wrong.append(problem)
            print(f"\n{problem}", file=sys.stderr)
        records += job.shard.records
        progress.update(done / len(table), records, last=done == len(table))
    return wrong


def check_shard(job: _Job) -> str:
    """Compares one file with what is known of it.

    Args:
        job: the file.

    Returns:
        What is wrong, or "".
    """
    shard = job.shard
    try:
        size, _ = storage.stat(job.path)
        if size != shard.bytes:
            return f"{job.path} has {size} bytes instead of {shard.bytes}."
        if manifests.digest_of(job.path, job.digest) != shard.digest:
            return f"{job.path} has other content than when it was indexed."
        if job.format == "tar":
            from data_pipelines.sources.tar import read_index

            index = read_index(job.index_path)
            if index.bytes != size:
                return f"{job.index_path} belongs to a tar of {index.bytes} bytes."
            records = len(index)
        elif job.format == "array_record" and storage.is_remote(job.path):
            records = shard.records  # counting would fetch the whole file
        else:
            records = count_records(job.path, job.format)
        if records != shard.records:
            return f"{job.path} holds {records} records instead of {shard.records}."
    except (BadShardError, OSError) as error:
        return str(error)
    return ""
