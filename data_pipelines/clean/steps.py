"""What a driver does: scan every part, resolve every partition of the keys, write every part.

Drivers differ only in how keys and positions travel between these steps.

    scan(part)       -> reasons of its rows (a file), keys of the rows that the rules keep
    resolve(kind)    -> positions to drop, for a partition of the keys
    write(part)      -> kept rows, their uids, counts (files)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from data_pipelines.clean import duplicates
from data_pipelines.clean.config import CleanConfig
from data_pipelines.clean.folder import Folder
from data_pipelines.clean.rules import CODES, KEPT, REASONS, Rules
from data_pipelines.metadata import keys
from data_pipelines.metadata.read import expand, read
from data_pipelines.metadata.schema import SCHEMA
from internvl_jax.config import ConfigError

U64 = np.uint64
ROW_BITS = 40
"""Of a position; the bits above number the part."""
CHUNK = 1 << 20  # rows whose keys are held before they are handed on
ROW_GROUP = 1 << 17  # rows that are written at a time
FREQUENT, NEAR = "caption_repeated", "near_phash"


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source.

    Attributes:
        number: its place in the order of the corpus.
        source: name of the source.
        path: of the file.
        size: in bytes.
    """

    number: int
    source: str
    path: str
    size: int

    @property
    def name(self) -> str:
        """Of the files that are made of it."""
        return f"{self.source}-{self.number:05d}"


def find_parts(config: CleanConfig) -> list[Part]:
    """The files of the corpus in order.

    Args:
        config: of the run.

    Raises:
        ConfigError: if a source has no file.
    """
    parts: list[Part] = []
    for source in config.order:
        patterns = config.sources[source].patterns
        files = expand(patterns)
        if not files:
            raise ConfigError(
                f"No file matches {', '.join(patterns)}: set --config.sources.{source}.files or "
                f"take {source} out of config.order."
            )
        parts += [Part(len(parts) + i, source, path, size) for i, (path, size) in enumerate(files)]
    return parts


def prepare(config: CleanConfig, parts: Sequence[Part]) -> Folder:
    """Opens the output folder for these settings and these files.

    Args:
        config: of the run.
        parts: of the corpus.

    Raises:
        ConfigError: if it holds the output of others.
    """
    folder = Folder(config.output)
    listing = [[p.source, p.path.rsplit("/", 1)[-1], p.size] for p in parts]
    inputs = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    now = {"settings": config.digest(), "inputs": inputs}
    if (before := folder.read_json("run.json")) is not None:
        for what, digest in now.items():
            if before.get(what) != digest:
                raise ConfigError(
                    f"{config.output} was begun with other {what}: choose another --config.output "
                    "or remove that folder."
                )
    folder.write_json("run.json", now)
    return folder


def kinds(config: CleanConfig) -> list[str]:
    """The kinds of keys that are compared, by the reason they drop rows for."""
    wanted = [f"duplicate_{key}" for key in config.duplicates.keys]
    return wanted + ([FREQUENT] if config.duplicates.caption_count is not None else [])


def precedence(config: CleanConfig) -> list[str]:
    """The reasons that other rows give, in the order in which they count."""
    names = [*kinds(config), *([NEAR] if config.duplicates.distance else [])]
    return sorted(names, key=CODES.__getitem__)


_KEYS: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "duplicate_url": (("url",), keys.url_keys),
    "duplicate_url_caption": (
        ("url", "caption"),
        lambda u, c: keys.combine(keys.url_keys(u), keys.caption_keys(c)),
    ),
    "duplicate_caption": (("caption",), keys.caption_keys),
    "duplicate_sha256": (("sha256",), lambda s: keys.hash_strings(s, seed=4)),
    "duplicate_phash": (("phash",), lambda p: p.to_numpy(zero_copy_only=False)),
    FREQUENT: (("caption",), keys.caption_keys),
}

Chunk = tuple[str, np.ndarray, np.ndarray]
"""A kind, keys [n] uint64, positions [n] uint64."""


def scan(config: CleanConfig, part: Part, folder: Folder) -> Iterator[Chunk]:
    """Applies the rules to a part; when all is read, writes the reasons of its rows.

    Args:
        config: of the run.
        part: to read.
        folder: of the output.

    Yields:
        Chunks of about `CHUNK` keys of rows that the rules keep; nulls have none.
    """
    rules = Rules(config, part.source)
    counted = config.duplicates.captions_of
    wanted = [
        kind
        for kind in kinds(config)
        if not counted or part.source in counted or "caption" not in _KEYS[kind][0]
    ]
    key_fields = list(dict.fromkeys(f for kind in wanted for f in _KEYS[kind][0]))
    fields = list(dict.fromkeys((*rules.fields, *key_fields)))
    reasons: list[np.ndarray] = []
    held: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in wanted}
    row, waiting, malformed = part.number << ROW_BITS, 0, [0]

    def count() -> None:
        malformed[0] += 1

    def flush() -> Iterator[Chunk]:
        for kind, chunks in held.items():
            if chunks:
                key, positions = zip(*chunks)
                yield kind, np.concatenate(key), np.concatenate(positions)
                chunks.clear()

    for batch in _read(config, part, fields, count):
        found = rules(batch)
        reasons.append(found)
        kept = np.flatnonzero(found == KEPT)
        positions = kept.astype(U64) + U64(row)
        batch = batch.select(key_fields)
        if len(kept) < len(found):
            batch = batch.filter(pa.array(found == KEPT))
        for kind in wanted:
            columns = [batch.column(f) for f in _KEYS[kind][0]]
            places = positions
            if columns[0].null_count:
                valid = columns[0].is_valid()
                columns = [c.filter(valid) for c in columns]
                places = positions[valid.to_numpy(zero_copy_only=False)]
            if len(places):
                held[kind].append((_KEYS[kind][1](*columns), places))
        row += len(found)
        waiting += len(kept)
        if waiting >= CHUNK:
            yield from flush()
            waiting = 0
    yield from flush()
    folder.write_array(
        f"work/reasons/{part.name}.npy", np.concatenate(reasons or [np.empty(0, np.uint8)])
    )
    folder.write_json(f"work/reasons/{part.name}.json", {"malformed": malformed[0]})


def _read(
    config: CleanConfig,
    part: Part,
    fields: Sequence[str] | None,
    count: Callable[[], None],
    keep: np.ndarray | None = None,
) -> Iterator[Any]:
    reader = config.sources[part.source].reader or part.source
    return read(part.path, reader, fields, keep=keep, name=part.source, malformed=count)


def split(key: np.ndarray, partitions: int, *others: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Divides rows among partitions by their key.

    Args:
        key: [n] uint64.
        partitions: how many.
        *others: further columns [n].

    Yields:
        Partition and its (key, *others), for partitions that have rows.
    """
    # Hashes of pictures are not even; their product with an odd number is.
    place = ((key * U64(0x9E3779B97F4A7C15)) >> U64(32)) * U64(partitions) >> U64(32)
    place = place.astype(np.uint16)
    order = np.argsort(place, kind="stable")  # a radix sort
    counts = np.bincount(place, minlength=partitions)
    ends = np.cumsum(counts)
    columns = [column[order] for column in (key, *others)]
    for number in np.flatnonzero(counts):
        rows = slice(ends[number] - counts[number], ends[number])
        yield int(number), tuple(column[rows] for column in columns)


def resolve(
    config: CleanConfig, kind: str, key: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Finds the duplicates among all rows of a partition.

    Args:
        config: of the run.
        kind: see `kinds`.
        key: [n] uint64.
        positions: [n] uint64.

    Returns:
        Positions to drop, ascending, and where pictures that are alike are wanted, what
        `resolve_near` needs: (group, hash, position) of every distinct hash, once for every mask.
    """
    if kind == FREQUENT:
        most = config.duplicates.caption_count
        assert most is not None
        return duplicates.frequent(key, positions, most), iter(())
    if kind != "duplicate_phash" or not config.duplicates.distance:
        return duplicates.repeated(key, positions), iter(())
    hashes, first = duplicates.firsts(key, positions)

    def groups() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        settings = config.duplicates
        for i, mask in enumerate(duplicates.masks(settings.distance, settings.bands)):
            yield keys.combine(hashes & U64(mask), np.full(len(hashes), i, U64)), hashes, first

    return duplicates.repeated(key, positions), groups()


def write(
    config: CleanConfig, part: Part, folder: Folder, drops: Sequence[tuple[str, np.ndarray]]
) -> None:
    """Writes what is kept of a part, the uids of that, and last of all the counts.

    Args:
        config: of the run.
        part: to read again.
        folder: of the output, with the reasons that `scan` wrote.
        drops: (reason, positions of this part), in order of precedence.

    Raises:
        MetadataError: if the file is not what `scan` read.
    """
    reasons = folder.read_array(f"work/reasons/{part.name}.npy")
    malformed = folder.read_json(f"work/reasons/{part.name}.json")["malformed"]
    for reason, positions in drops:
        rows = (positions & U64((1 << ROW_BITS) - 1)).astype(np.int64)
        reasons[rows[reasons[rows] == KEPT]] = CODES[reason]
    # Of what is dropped, only the examples are read again.
    wanted = reasons == KEPT
    for code in np.unique(reasons):
        wanted[np.flatnonzero(reasons == code)[: config.examples]] = True
    found = reasons[wanted]
    examples: dict[str, list[str]] = {}
    uids, waiting, start = [], [], 0
    schema = SCHEMA.with_metadata({"config": config.digest(), "part": part.name})
    coded: Any = ["source", "lang", "status"]
    with (
        folder.writing(f"kept/{part.name}.parquet") as file,
        pyarrow.parquet.ParquetWriter(file, schema, use_dictionary=coded) as writer,
    ):
        for batch in _read(config, part, None, lambda: None, wanted):
            codes = found[start : start + batch.num_rows]
            start += batch.num_rows
            _collect(examples, codes, batch, config.examples)
            if codes.any():
                batch = batch.filter(pa.array(codes == KEPT))
            waiting.append(batch)
            uids.append(_uid_pairs(batch.column("uid")))
            if sum(b.num_rows for b in waiting) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches(waiting, schema))
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))
    empty = np.empty(0, np.dtype("u8,u8"))
    folder.write_array(f"uids/{part.name}.npy", np.concatenate([*uids, empty]))
    counts = np.bincount(reasons, minlength=len(REASONS))
    counts[CODES["malformed"]] = malformed
    by_reason = {r: int(n) for r, n in zip(REASONS, counts) if n and r != "kept"}
    folder.write_json(
        f"counts/{part.name}.json",
        {
            "source": part.source,
            "rows": len(reasons) + malformed,
            "kept": int(counts[KEPT]),
            "dropped": by_reason,
            "examples": examples,
        },
    )


def _collect(examples: dict[str, list[str]], found: np.ndarray, batch: Any, most: int) -> None:
    for code in np.flatnonzero(np.bincount(found)):
        held = examples.setdefault(REASONS[code], [])
        if len(held) < most:
            rows = np.flatnonzero(found == code)[: most - len(held)]
            chosen = batch.select(["caption", "url"]).take(pa.array(rows)).to_pylist()
            held += [row["caption"] or row["url"] or "" for row in chosen]


def _uid_pairs(uids: Any) -> np.ndarray:
    words = np.frombuffer(uids.buffers()[1], ">u8").reshape(-1, 2)
    words = words[uids.offset : uids.offset + len(uids)].astype("<u8")
    return np.ascontiguousarray(words).view(np.dtype("u8,u8")).reshape(-1)
