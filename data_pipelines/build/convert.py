"""Packs pictures and texts into ArrayRecord: `tf.train.Example` of image, caption, language, key.

A set of conversations has ``conversations`` (LLaVA's JSON) in place of caption and language. Every
picture and caption is a value of its field, in order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from data_pipelines import manifest as manifests
from data_pipelines.build.index import TooManyBadError
from data_pipelines.build.tables import STANDARD
from data_pipelines.build.work import Journal, Progress, run
from data_pipelines.fields import Kind
from data_pipelines.sample import BadRecordError, Sample
from data_pipelines.sources import storage

RECORDS = 10_000
"""Records of a file; the reader keeps an index of all that it has open."""
JOURNAL = ".convert.jsonl"
SKIPPED = "skipped.jsonl"
VALIDATION = "validation"
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


@runtime_checkable
class Input(Protocol):
    """What can be converted; workers get it pickled."""

    @property
    def kind(self) -> Kind: ...

    def settings(self) -> dict[str, Any]:
        """What a conversion depends on."""
        ...

    def chunks(self, size: int) -> Iterator[tuple[float, Any]]:
        """Shares of the whole, and what `samples` takes."""
        ...

    def samples(self, chunk: Any) -> Iterator[tuple[int, str, Sample | BadRecordError]]:
        """Number of the record, its name, and its sample or what is wrong with it."""
        ...


@dataclasses.dataclass(frozen=True)
class Indexed:
    """An indexed set, such as img2dataset's tars, as what is converted.

    Attributes:
        folder: of its manifest.
        kind: of the set.
    """

    folder: str
    kind: Kind

    def settings(self) -> dict[str, Any]:
        """What a conversion depends on."""
        return {"set": [self.folder, _corpus(self.folder).digest]}

    def chunks(self, size: int) -> Iterator[tuple[float, range]]:
        """Record numbers, a number of them at a time.

        Args:
            size: most records of a chunk.

        Yields:
            Share of the set up to the end of the chunk, and the numbers.
        """
        total = len(_corpus(self.folder))
        for start in range(0, total, size):
            stop = min(start + size, total)
            yield stop / total, range(start, stop)

    def samples(self, chunk: range) -> Iterator[tuple[int, str, Sample | BadRecordError]]:
        """Reads some records.

        Args:
            chunk: their numbers.

        Yields:
            Number, name, and the sample or what is wrong with it.

        Raises:
            FileNotFoundError: if a file is missing.
        """
        corpus = _corpus(self.folder)
        for number in chunk:
            try:
                sample = corpus.sample(number)
                yield number, sample.key, sample
            except BadRecordError as error:
                yield number, "", error


@functools.lru_cache(maxsize=1)
def _corpus(folder: str) -> manifests.Corpus:
    return manifests.open_corpus(folder)


@dataclasses.dataclass(frozen=True)
class _Job:
    number: int
    input: Input
    chunk: Any
    share: float
    out: str
    validation: float


def convert(
    input: Input,
    out: str,
    *,
    records: int = RECORDS,
    validation: float = 0.0,
    workers: int = 1,
    max_bad: float = 0.05,
) -> tuple[dict[str, manifests.Manifest], collections.Counter[str]]:
    """Writes an ArrayRecord set.

    Args:
        input: what is converted.
        out: a local folder.
        records: most records of a file.
        validation: share of the records that go to the folder ``validation``, chosen by a hash of
            their keys: the same records however the set grows.
        workers: processes.
        max_bad: greatest share of records that may be unusable. All of them are listed in
            ``skipped.jsonl``.

    Returns:
        Folder of each manifest -> its content, and how many records were skipped for each reason.

    Raises:
        ValueError: if the folder was begun with other settings, or is not local.
        TooManyBadError: if too many records are unusable, or all; no manifest is written then.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"--validation {validation} is no share; give one from 0 up to 1.")
    if storage.is_remote(out):
        raise ValueError(
            f"ArrayRecord files are written to a local disk, and {out} is none: write them there "
            "and copy the folder."
        )
    if records < 1:
        raise ValueError(f"--records {records} must be at least 1.")
    folder = pathlib.Path(out)
    settings = {**input.settings(), "records": records, "validation": validation}
    with Journal(folder / JOURNAL, {"kind": input.kind, **settings}) as journal:
        # Tables of an earlier, finished conversion would not fit what is being written.
        for place in (folder, folder / VALIDATION):
            (place / manifests.MANIFEST).unlink(missing_ok=True)
        results = _write(input, out, records, validation, workers, journal)
        reasons = _count_skipped(folder, results, max_bad)
        # The journal stays: a second run finds everything done, one with other settings is told.
        return _write_manifests(input, out, results), reasons


def _write(
    input: Input, out: str, records: int, validation: float, workers: int, journal: Journal
) -> list[dict[str, Any]]:
    progress, made = Progress(f"convert to {out}", "records"), 0

    def jobs() -> Iterator[_Job]:
        for number, (share, chunk) in enumerate(input.chunks(records)):
            if not _is_there(out, journal.done.get(str(number))):
                yield _Job(number, input, chunk, share, out, validation)
            else:
                progress.update(share, 0)

    for job, result in run(jobs(), write_chunk, workers):
        journal.add(str(job.number), result)
        made += result["read"]
        progress.update(job.share, made)
    progress.update(1.0, made, last=True)
    return [journal.done[name] for name in sorted(journal.done, key=int)]


def _is_there(out: str, result: dict[str, Any] | None) -> bool:
    paths = {
        os.path.join(out, file["split"], file["path"]): file["bytes"]
        for file in (result or {}).get("files", ())
    }
    return result is not None and all(
        os.path.isfile(path) and os.path.getsize(path) == size for path, size in paths.items()
    )


def _count_skipped(
    folder: pathlib.Path, results: list[dict[str, Any]], max_bad: float
) -> collections.Counter[str]:
    skipped = [row for result in results for row in result["skipped"]]
    with (folder / SKIPPED).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in skipped)
    read = sum(result["read"] for result in results)
    reasons = collections.Counter(row["reason"] for row in skipped)
    if len(skipped) > max_bad * read:
        raise TooManyBadError(
            f"{len(skipped)} of {read} records cannot be used ({told(reasons)}), more than "
            f"--max_bad {max_bad:g} allows; {folder / SKIPPED} lists them. What is written stays: "
            "run again with a higher --max_bad to keep it."
        )
    if read == len(skipped):
        raise TooManyBadError(f"No record is left to write into {folder} ({told(reasons)}).")
    return reasons


def _write_manifests(
    input: Input, out: str, results: list[dict[str, Any]]
) -> dict[str, manifests.Manifest]:
    written = {}
    for split in ("", VALIDATION):
        shards = [
            manifests.Shard(
                file["path"], file["records"], file["bytes"], bytes.fromhex(file["digest"])
            )
            for result in results
            for file in result["files"]
            if file["split"] == split
        ]
        if shards:
            place = os.path.join(out, split) if split else out
            written[place] = manifests.write_manifest(
                place, shards, kind=input.kind, format="array_record", fields=STANDARD
            )
    return written


def told(reasons: collections.Counter[str]) -> str:
    """Reasons with their counts, the most frequent first.

    Args:
        reasons: reason -> count.

    Returns:
        E.g. "3 missing image, 1 encoding".
    """
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def write_chunk(job: _Job) -> dict[str, Any]:
    """Writes the records of a chunk, a file for each split.

    Args:
        job: what to write.

    Returns:
        {read, files, skipped}, as the journal holds it.
    """
    skipped, read = [], 0
    with contextlib.ExitStack() as stack:
        files: dict[str, _File] = {}
        for number, name, sample in job.input.samples(job.chunk):
            read += 1
            if isinstance(sample, Sample):
                sample = check_pictures(sample)
            if isinstance(sample, BadRecordError):
                skipped.append(
                    {"record": number, "name": name, "reason": sample.reason, "why": str(sample)}
                )
                continue
            split = VALIDATION if is_held_out(sample.key, job.validation) else ""
            if split not in files:
                path = pathlib.Path(job.out, split, f"part-{job.number:06d}.array_record")
                files[split] = stack.enter_context(_File(path))
            files[split].write(serialize(sample))
    done = [
        {
            "split": split,
            "path": file.path.name,
            "records": file.records,
            "bytes": file.path.stat().st_size,
            "digest": manifests.digest_of(str(file.path)).hex(),
        }
        for split, file in files.items()
    ]
    return {"read": read, "files": done, "skipped": skipped}


class _File:
    """An ArrayRecord file that is there complete or not at all."""

    def __init__(self, path: pathlib.Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.records = path, 0
        self._writing = path.with_name(path.name + ".tmp")
        # Pictures are compressed already, and a group would be read for each of its records.
        self._writer: Any = ArrayRecordWriter(str(self._writing), "group_size:1,uncompressed")

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self.records += 1

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._writer.close()
        if kind is None:
            self._writing.replace(self.path)
        else:
            self._writing.unlink()


def check_pictures(sample: Sample) -> Sample | BadRecordError:
    """Looks at the first bytes of pictures: an error page saved as .jpg is not one.

    Args:
        sample: with encoded pictures.

    Returns:
        The sample, or what is wrong with it.
    """
    for image in sample.images:
        data = bytes(image[:16])
        webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
        if not webp and not data.startswith(SIGNATURES):
            return BadRecordError(
                "not a picture", f"The picture of {sample.key} begins with {data[:12]!r}."
            )
    return sample


def is_held_out(key: str, share: float) -> bool:
    """Whether a record is kept for validation.

    Args:
        key: of the record.
        share: of all records that is.

    Returns:
        True if so.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def serialize(sample: Sample) -> bytes:
    """The record of a sample.

    Args:
        sample: with encoded pictures.

    Returns:
        The serialised `tf.train.Example`.
    """
    from data_pipelines.sources.tfds import serialize as as_example

    values: dict[str, list[bytes]] = {
        "key": [sample.key.encode()],
        "image": [bytes(image) for image in sample.images],
    }
    if sample.turns:
        turns = [{"from": turn.role, "value": turn.value} for turn in sample.turns]
        values["conversations"] = [json.dumps(turns, ensure_ascii=False).encode()]
    else:
        values["caption"] = [caption.text.encode() for caption in sample.captions]
        values["language"] = [sample.captions[0].language.encode()]
    return as_example(values)
