"""Open data archives and hash files. Sizes and times alone do not reveal every change."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from phatgoose.errors import PhatgooseError, reason_of


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        PhatgooseError: the file cannot be read.
    """
    try:
        state = path.stat()
        # Users can set a file's modification time, but not the change time of its inode.
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return _digest(str(path), stamp)
    except OSError as error:
        raise PhatgooseError(f"cannot read {path}: {reason_of(error)}") from error


def folder_digests(folder: Path, patterns: Iterable[str] = ("*",)) -> list[list[str]]:
    """Return name and SHA-256 of all files below a folder that match one of the patterns.

    Files that git and the hub's client keep beside the data are excluded.
    """
    files = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return [
        [str(path.relative_to(folder)), file_digest(path)]
        for path in sorted(files)
        if not {".git", ".cache", "__pycache__"} & {*path.relative_to(folder).parts}
    ]


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a source distribution of the package index, a .tar.gz file.

    Raises:
        PhatgooseError: it is damaged; this may only be found while reading.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            yield archive
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise PhatgooseError(
            f"{path} is damaged ({reason_of(error)}). Delete it and run again to download it again."
        ) from error


@lru_cache(maxsize=2**16)
def _digest(path: str, stamp: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file, computed once per process for each state of the file."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
