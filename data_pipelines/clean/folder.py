"""The output folder, local or of any file system that fsspec knows; files appear whole."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np


class Folder:
    """A folder whose files are written under another name first and then renamed.

    Args:
        path: e.g. "data/clean1" or "gs://bucket/clean1"; it need not exist.
    """

    def __init__(self, path: str):
        self.files, self.path = fsspec.core.url_to_fs(path)

    def at(self, name: str) -> str:
        """The path of a file in it."""
        return f"{self.path}/{name}"

    def has(self, name: str) -> bool:
        """Whether a file is there, whole."""
        return self.files.exists(self.at(name))

    def names(self, pattern: str) -> list[str]:
        """Names of files like "counts/*.json", in order."""
        return sorted(path[len(self.path) + 1 :] for path in self.files.glob(self.at(pattern)))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A binary file that gets its name if the block ends well."""
        target = self.at(name)
        self.files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        with self.files.open(f"{target}.tmp", "wb") as file:
            yield file
        self.files.mv(f"{target}.tmp", target)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value."""
        with self.writing(name) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """A file's value, None where there is no file."""
        return json.loads(self.files.cat_file(self.at(name))) if self.has(name) else None

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Writes an array."""
        with self.writing(name) as file:
            np.save(file, array, allow_pickle=False)

    def read_array(self, name: str) -> np.ndarray:
        """A file's array."""
        content = self.files.cat_file(self.at(name))
        return np.load(io.BytesIO(content), allow_pickle=False)

    def remove(self, name: str) -> None:
        """Removes a file or folder, if it is there."""
        if self.has(name):
            self.files.rm(self.at(name), recursive=True)
