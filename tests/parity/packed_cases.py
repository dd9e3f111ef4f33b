"""Packs reference folders for the tests: ``python tests/parity/packed_cases.py FOLDER...``.

Random float32 weights hardly compress as they are; byte by byte (all first bytes, all second bytes
...) their exponents do. Packing is lossless.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

CASES = Path(__file__).parent / "cases"


def shuffle(raw: bytes) -> bytes:
    """Every fourth byte from the first on, then from the second on ..., then the rest."""
    whole = len(raw) // 4 * 4
    return b"".join(raw[i:whole:4] for i in range(4)) + raw[whole:]


def unshuffle(packed: bytes) -> bytes:
    """The inverse of `shuffle`."""
    quarter = len(packed) // 4
    raw = bytearray(packed)
    for i in range(4):
        raw[i : quarter * 4 : 4] = packed[i * quarter : (i + 1) * quarter]
    return bytes(raw)


def pack(folder: Path) -> Path:
    """Writes one folder's files into ``cases/NAME.zip``."""
    target = CASES / f"{folder.name}.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(folder.iterdir()):
            raw = file.read_bytes()
            data = shuffle(raw) if file.suffix == ".safetensors" else raw
            archive.writestr(zipfile.ZipInfo(file.name), data, zipfile.ZIP_DEFLATED, 9)
    return target


def unpack(name: str, destination: Path) -> Path:
    """Restores a packed folder below `destination`."""
    folder = destination / name
    folder.mkdir()
    with zipfile.ZipFile(CASES / f"{name}.zip") as archive:
        for file in archive.namelist():
            data = archive.read(file)
            raw = unshuffle(data) if file.endswith(".safetensors") else data
            (folder / file).write_bytes(raw)
    return folder


if __name__ == "__main__":
    CASES.mkdir(exist_ok=True)
    for argument in sys.argv[1:]:
        print(pack(Path(argument)))
