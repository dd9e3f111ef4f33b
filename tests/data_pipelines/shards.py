"""Small files of every format, for the tests."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

JPEG = b"\xff\xd8\xff"


def write_tar(path: pathlib.Path, count: int, first: int = 0) -> pathlib.Path:
    """As img2dataset writes it: jpg, txt, json."""
    with tarfile.open(path, "w") as archive:
        for i in range(first, first + count):
            key = f"{i:09d}"
            about = json.dumps({"key": key, "caption": f"caption {i}", "language": "it"})
            for extension, data in (
                ("jpg", JPEG + str(i).encode()),
                ("json", about.encode()),
                ("txt", f"caption {i}".encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write_array_record(path: pathlib.Path, count: int) -> pathlib.Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(count):
        writer.write(f"record {i}".encode())
    writer.close()
    return path


def write_parquet(path: pathlib.Path, count: int, group: int = 3) -> pathlib.Path:
    """As Hugging Face writes it: the picture is a struct of bytes and path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "image": {"bytes": JPEG + str(i).encode(), "path": f"{i}.jpg"},
            "more": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": None}],
            "caption": f"caption {i}",
            "score": i / 2,
            "about": {"lang": "it", "size": {"width": i}},
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path
