"""Counts and indexes the files of a set where they lie, and writes the manifest."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import manifest as manifests
from data_pipelines.build.work import Journal, Progress, run
from data_pipelines.fields import FieldNames, Kind, guess
from data_pipelines.sample import BadRecordError
from data_pipelines.sets.corpus import SPLIT
from data_pipelines.sources import BadShardError, storage
from data_pipelines.sources.shards import ShardList

PATTERNS = {
    "tar": re.compile(r"\.tar$"),
    "array_record": re.compile(r"\.(array_record|arrayrecord)(-\d+-of-\d+)?$"),
    "parquet": re.compile(r"\.parquet$"),
}
JOURNAL = ".index.jsonl"
LOOKED_AT = 16
"""Records of which one must be readable, to see its fields."""


class TooManyBadError(RuntimeError):
    """More of the input is unusable than allowed."""


@dataclasses.dataclass(frozen=True)
class _Job:
    root: str
    folder: str
    path: str
    format: str
    digest: str
    records: int | None  # where it is known without opening the file
    previous: Mapping[str, Any] | None  # what an interrupted run found


def index(
    folder: str,
    out: str = "",
    *,
    format: str = "",
    names: Mapping[str, str] | None = None,
    digest: str = "ends",
    workers: int = 1,
    max_bad: float = 0.01,
) -> dict[str, manifests.Manifest]:
    """Makes a folder of files a set that `manifest.open_corpus` opens.

    Tars get an index file each; nothing else is written beside the manifest. A folder that TFDS
    prepared becomes one set for each split: "train" (or the only one) in the folder itself, the
    others in a folder of their name.

    Args:
        folder: with the files, local or a URL; folders in it are searched too, but neither those
            with a manifest of their own nor ``validation``, which is a set by itself.
        out: where manifest and indexes go; by default the folder itself.
        format: one of `manifest.FORMATS`; by default what is found, in that order.
        names: role -> field, as `fields.guess` takes.
        digest: one of `manifest.DIGESTS`.
        workers: processes.
        max_bad: greatest share of broken files.

    Returns:
        Folder of each manifest -> its content.

    Raises:
        FileNotFoundError: if there are no files.
        ValueError: if the fields are not found.
        TooManyBadError: if too many files are broken; no manifest is written then.
    """
    folder = folder if storage.is_remote(folder) else os.path.abspath(folder)
    out = out or folder
    out = out if storage.is_remote(out) else os.path.abspath(out)
    if storage.exists(storage.join(folder, "dataset_info.json")):
        splits = tfds_splits(folder)
        main = "train" if "train" in splits else next(iter(splits))
        named = {"val": SPLIT}  # where training looks for it
        targets = [(s, out if s == main else storage.join(out, named.get(s, s))) for s in splits]
        targets.sort(key=lambda target: target[1] != out)
    else:
        format, files = find(folder, format)
        splits, targets = {"": [(file, None) for file in files]}, [("", out)]
    return {
        target: _index(
            folder,
            target,
            format or "array_record",
            splits[split],
            names or {},
            digest,
            workers,
            max_bad,
        )
        for split, target in targets
    }


def _index(
    root: str,
    out: str,
    format: str,
    files: Sequence[tuple[str, int | None]],
    names: Mapping[str, str],
    digest: str,
    workers: int,
    max_bad: float,
) -> manifests.Manifest:
    # An object store cannot append; there the indexes alone tell what is done.
    path = None if storage.is_remote(out) else pathlib.Path(out) / JOURNAL
    settings = {"root": root, "format": format, "digest": digest}
    with Journal(path, settings) as journal:
        shards = _count(root, out, format, files, digest, workers, max_bad, journal)
        fields, kind = _fields(root, out, format, shards, names)
        written = manifests.write_manifest(
            out,
            shards,
            kind=kind,
            format=format,
            fields=fields,
            root=_relative(root, out),
            digest=digest,
        )
        journal.finish()
    return written


def _count(
    root: str,
    out: str,
    format: str,
    files: Sequence[tuple[str, int | None]],
    digest: str,
    workers: int,
    max_bad: float,
    journal: Journal,
) -> list[manifests.Shard]:
    before = dict(journal.done)
    jobs = (
        _Job(root, out, path, format, digest, records, before.get(path)) for path, records in files
    )
    progress, found, broken, records = Progress(f"index {out}", "records"), {}, [], 0
    for done, (job, result) in enumerate(run(jobs, index_shard, workers), 1):
        if "error" in result:
            broken.append(result["error"])
            print(f"\nskipped: {result['error']}", file=sys.stderr)
        else:
            found[job.path] = result
            records += result["records"]
            if result != job.previous:
                journal.add(job.path, result)
        note = f"{done} of {len(files)} files" + (f", {len(broken)} broken" if broken else "")
        progress.update(done / len(files), records, note=note, last=done == len(files))
    if len(broken) > max_bad * len(files):
        raise TooManyBadError(
            f"{len(broken)} of the {len(files)} files in {root} are broken (listed above), more "
            f"than --max_bad {max_bad:g} allows; fetch them again or allow more. What is indexed "
            "stays."
        )
    return [
        manifests.Shard(path, entry["records"], entry["bytes"], bytes.fromhex(entry["digest"]))
        for path, entry in sorted(found.items())
    ]


def _relative(root: str, out: str) -> str:
    if storage.is_remote(root) or storage.is_remote(out):
        same = root.partition("://")[0] == out.partition("://")[0]
        return posixpath.relpath(root, out) if same and root.startswith(out.rstrip("/")) else root
    inside = os.path.commonpath([root, out]) in (root, out)
    return os.path.relpath(root, out) if inside else root


def _fields(
    root: str,
    out: str,
    format: str,
    shards: Sequence[manifests.Shard],
    names: Mapping[str, str],
) -> tuple[FieldNames, Kind]:
    first = next((shard for shard in shards if shard.records), None)
    if first is None:
        raise ValueError(f"The files in {root} hold no records.")
    pair = (storage.join(root, first.path), first.records)
    source = manifests.make_source(
        format, ShardList([pair], [storage.join(out, first.path + ".idx")])
    )
    for number in range(min(LOOKED_AT, first.records)):
        try:
            return guess(source[number], names, pair[0])
        except BadRecordError as error:
            last = error
    raise ValueError(f"The first records of {pair[0]} cannot be read: {last}")


def index_shard(job: _Job) -> dict[str, Any]:
    """Counts one file, and indexes it if it is a tar.

    Args:
        job: which file, and how.

    Returns:
        {records, bytes, changed, digest}, or {error: sentence}.
    """
    path = storage.join(job.root, job.path)
    try:
        size, changed = storage.stat(path)
        last = job.previous
        index_path = storage.join(job.folder, job.path + ".idx")
        if (
            last
            and (last["bytes"], last["changed"]) == (size, changed)
            and (job.format != "tar" or storage.exists(index_path))
        ):
            return dict(last)
        records = job.records
        if records is None:
            records = (
                _index_tar(path, index_path, size, changed)
                if job.format == "tar"
                else (count_records(path, job.format))
            )
        digest = manifests.digest_of(path, job.digest).hex()
    except (BadShardError, OSError) as error:
        return {"error": str(error)}
    return {"records": records, "bytes": size, "changed": changed, "digest": digest}


def _index_tar(path: str, index_path: str, size: int, changed: int) -> int:
    from data_pipelines.sources import tar

    try:
        index = tar.read_index(index_path)
        if (index.bytes, index.changed) == (size, changed):
            return len(index)
    except (FileNotFoundError, BadShardError):
        pass
    index = tar.scan(path)
    storage.write(index_path, index.pack())
    return len(index)


def count_records(path: str, format: str) -> int:
    """Opens an ArrayRecord or parquet file to see how many records it has.

    Args:
        path: local or a URL.
        format: "array_record" or "parquet".

    Returns:
        The number.

    Raises:
        BadShardError: if it cannot be read.
    """
    if format == "parquet":
        from data_pipelines.sources.parquet import open_file

        file = open_file(path)
        records = file.metadata.num_rows
        file.close(force=True)
        return records
    from data_pipelines.sources.array_record import open_reader

    reader, _ = open_reader(path)
    records = reader.num_records()
    reader.close()
    return records


def find(folder: str, format: str = "") -> tuple[str, list[str]]:
    """The files of a set.

    Args:
        folder: local or a URL.
        format: one of `manifest.FORMATS`, or "" for the first that is found.

    Returns:
        The format, and paths relative to the folder in order.

    Raises:
        FileNotFoundError: if there are none.
    """
    every = list(storage.walk(folder))
    others = {posixpath.dirname(path) for path in every if path.endswith("/" + manifests.MANIFEST)}
    every = [path for path in every if not any(path.startswith(f"{other}/") for other in others)]
    trained = [path for path in every if not path.startswith(f"{SPLIT}/")]
    if len(trained) < len(every):
        print(
            f"{storage.join(folder, SPLIT)} holds what is not trained on and is left out here; "
            "index it by itself.",
            file=sys.stderr,
        )
        every = trained
    for candidate in [format] if format else manifests.FORMATS:
        paths = sorted(path for path in every if PATTERNS[candidate].search(path))
        if paths:
            return candidate, paths
    seen = sorted({posixpath.splitext(path)[1] or posixpath.basename(path) for path in every})
    raise FileNotFoundError(
        f"{folder} holds no {format or 'tar, array_record or parquet'} files; found "
        f"{', '.join(seen[:8]) or 'nothing'}."
    )


def tfds_splits(folder: str) -> dict[str, list[tuple[str, int | None]]]:
    """What a folder holds that TFDS prepared, as its dataset_info.json says.

    Args:
        folder: local or a URL.

    Returns:
        Split -> (file, records), splits without records left out.

    Raises:
        ValueError: if it is of another file format, or files are missing.
    """
    path = storage.join(folder, "dataset_info.json")
    try:
        info = json.loads(storage.read(path))
        format = info.get("fileFormat", "tfrecord")
        counts = {
            split["name"]: [int(n) for n in split.get("shardLengths", ())]
            for split in info["splits"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); prepare the set again.") from error
    if format != "array_record":
        raise ValueError(
            f"{folder} was prepared as {format}; prepare it with file_format='array_record'."
        )
    every = sorted(storage.walk(folder))
    splits: dict[str, list[tuple[str, int | None]]] = {}
    for split, lengths in counts.items():
        files = [
            p for p in every if re.search(rf"-{re.escape(split)}\.array_record-\d+-of-\d+$", p)
        ]
        if len(files) != len(lengths):
            raise ValueError(
                f"{folder} has {len(files)} files of the split {split!r} instead of "
                f"{len(lengths)}; prepare it again."
            )
        if sum(lengths):
            splits[split] = list(zip(files, lengths))
    if not splits:
        raise ValueError(f"{path} names no split with records; prepare the set again.")
    return splits
