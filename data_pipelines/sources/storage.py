"""Bytes of files by range: local paths, and object stores' URLs through fsspec.

Reads of object stores are tried again, waiting twice as long each time; what is not there or not
allowed is said at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import posixpath
import random
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

ATTEMPTS = 6
WAIT = 0.2
"""Seconds before the second attempt."""
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs"}
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)
"""Errors that another attempt would not change."""

Result = TypeVar("Result")


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as gs://bucket/folder."""
    return "://" in path


def join(folder: str, path: str) -> str:
    """A path seen from a folder.

    Args:
        folder: local or a URL.
        path: relative, or complete by itself.

    Returns:
        The path, with ".." resolved.
    """
    if is_remote(path) or os.path.isabs(path):
        return path
    if is_remote(folder):
        scheme, _, rest = folder.partition("://")
        # memory:///x and file:///x begin with the slash of their root.
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, path))}"
    return os.path.normpath(os.path.join(folder, path))


@functools.cache
def _filesystem(scheme: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme, "fsspec")
        raise ImportError(f"{scheme}:// needs a package: pip install {package}.") from error
    except ValueError as error:
        raise ValueError(f"{scheme}:// is no storage that fsspec knows.") from error


def _remote(url: str) -> tuple[Any, str]:
    filesystem = _filesystem(url.partition("://")[0])
    return filesystem, filesystem._strip_protocol(url)


def _insist(what: str, call: Callable[[], Result]) -> Result:
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FINAL:
            raise
        except Exception as error:  # every store has its own errors for a lost connection
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{what} failed {ATTEMPTS} times, at last with: {error}.") from error
            time.sleep(WAIT * 2**attempt * (0.5 + random.random()))
    raise AssertionError


class RangedFile:
    """A file read by range, by any number of threads at once.

    Attributes:
        path: its path or URL.
        size: its bytes.
    """

    def __init__(self, path: str):
        """Opens the file.

        Args:
            path: local or a URL.

        Raises:
            FileNotFoundError: if it is not there (of a URL, at the first read).
        """
        self.path, self._fd = path, -1
        self._size: int | None = None
        if is_remote(path):
            self._remote = _remote(path)
        else:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def size(self) -> int:
        if self._fd >= 0:
            return os.fstat(self._fd).st_size
        if self._size is None:
            self._size = stat(self.path)[0]
        return self._size

    def read(self, start: int, stop: int) -> bytes:
        """Reads a range.

        Args:
            start: first byte.
            stop: byte after the last one.

        Returns:
            The bytes; fewer only where the file ends.
        """
        if stop <= start:
            return b""
        if self._fd < 0:
            filesystem, name = self._remote
            call = lambda: filesystem.cat_file(name, start=start, end=stop)
            return _insist(f"Reading {self.path}", call)
        data = os.pread(self._fd, stop - start, start)
        while len(data) < stop - start:  # Linux reads at most 2 GiB at once
            more = os.pread(self._fd, stop - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Gives the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SeekableFile(io.RawIOBase):
    """A `RangedFile` as a Python file, for libraries that want one."""

    def __init__(self, path: str):
        """Opens the file.

        Args:
            path: local or a URL.
        """
        self._file, self._at = RangedFile(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._file.size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._file.read(self._at, self._at + wanted)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def allow_open_files(count: int) -> None:
    """Raises the process' limit of open files, often 1,024, as far as the system lets it.

    Without a descriptor a good record counts as unreadable.

    Args:
        count: files that may be open at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS has a limit beside this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def read(path: str) -> bytes:
    """Reads a whole file.

    Args:
        path: local or a URL.

    Returns:
        Its bytes.
    """
    if not is_remote(path):
        return pathlib.Path(path).read_bytes()
    filesystem, name = _remote(path)
    return _insist(f"Reading {path}", lambda: filesystem.cat_file(name))


def write(path: str, data: bytes) -> None:
    """Writes a whole file at once: it is there complete or not at all.

    Args:
        path: local or a URL; folders are made.
        data: its bytes.
    """
    if is_remote(path):
        filesystem, name = _remote(path)
        return _insist(f"Writing {path}", lambda: filesystem.pipe_file(name, data))
    final = pathlib.Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    writing = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    writing.write_bytes(data)
    writing.replace(final)


def exists(path: str) -> bool:
    """Whether a file is there.

    Args:
        path: local or a URL.

    Returns:
        True if so.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    filesystem, name = _remote(path)
    return _insist(f"Looking for {path}", lambda: filesystem.isfile(name))


def remove(path: str) -> None:
    """Removes a file if it is there.

    Args:
        path: local or a URL.
    """
    if not is_remote(path):
        pathlib.Path(path).unlink(missing_ok=True)
    elif exists(path):
        filesystem, name = _remote(path)
        _insist(f"Removing {path}", lambda: filesystem.rm_file(name))


def stat(path: str) -> tuple[int, int]:
    """Size and time of a file.

    Args:
        path: local or a URL.

    Returns:
        Bytes, and the time of its last change in nanoseconds (0 where the store does not say).
    """
    if not is_remote(path):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    filesystem, name = _remote(path)
    info = _insist(f"Looking at {path}", lambda: filesystem.info(name))
    changed: Any = info.get("mtime") or info.get("LastModified") or info.get("created")
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    return int(info["size"]), int(seconds * 1e9) if isinstance(seconds, int | float) else 0


def _raise(error: OSError) -> None:
    raise error


def walk(folder: str) -> Iterator[str]:
    """The files of a folder and of the folders in it.

    Args:
        folder: local or a URL.

    Yields:
        Paths relative to the folder, with "/", in no particular order; those whose name or folder
        begins with a dot are left out.

    Raises:
        OSError: if the folder, or one in it, is missing or may not be read.
    """
    if is_remote(folder):
        filesystem, name = _remote(folder)
        for path in _insist(f"Listing {folder}", lambda: filesystem.find(name)):
            relative = posixpath.relpath(path, name)
            if not any(part.startswith(".") for part in relative.split("/")):
                yield relative
        return
    for where, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        for file in files:
            if not file.startswith("."):
                yield os.path.relpath(os.path.join(where, file), folder).replace(os.sep, "/")
