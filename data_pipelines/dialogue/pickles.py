"""Pickles that may only hold data: RefCOCO's annotations come as ``refs(unc).p``."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import numpy as np


def load(path: pathlib.Path) -> Any:
    """Reads a pickle of lists, dicts, tuples, text, numbers and numpy scalars.

    Nothing that the file names is imported or called: the few numpy names that scalars need are
    stood in for here, any other name ends the reading.

    Args:
        path: the pickle, of any protocol, also of Python 2.

    Returns:
        What it holds; numpy scalars become Python numbers.

    Raises:
        ValueError: if it asks for anything else, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except _ForbiddenError as error:
            raise ValueError(
                f"{path} is refused: it asks for {error}, and a file of annotations holds only "
                "lists, dicts, text and numbers; fetch it from a source you trust."
            ) from None
        except Exception as error:  # a damaged pickle raises whatever its opcodes meet
            raise ValueError(
                f"{path} is no pickle that can be read ({type(error).__name__}: {error}); "
                "fetch it again."
            ) from None


class _ForbiddenError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return lambda code, *_: _DType(code)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return lambda dtype, data: _scalar(dtype, data)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in old protocols
            return lambda text, _="latin1": text.encode("latin1")
        raise _ForbiddenError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError("an object outside of the file")


class _DType:
    """Stands for numpy's: letter and size, and the byte order that is set afterwards."""

    def __init__(self, code: str):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in "<>=" else "="


def _scalar(dtype: _DType, data: str | bytes) -> Any:
    code = dtype.code.lstrip("<>=|")
    if code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "b1"):
        raise _ForbiddenError(f"a numpy scalar of type {dtype.code!r}")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype.order + code)[0].item()
