"""Reference folders for the tests: packed ones, a private one, and cases of other sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from packed_cases import unpack


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A reference folder by name, unpacked once."""
    root = tmp_path_factory.mktemp("cases")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else unpack(name, root)

    return folder
