"""Hash the content of files, since sizes and times do not tell whether a file was changed."""

import hashlib
from collections.abc import Iterable
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
        # The time of the last change of the inode cannot be set by a user, unlike the file's time.
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return _digest(str(path), stamp)
    except OSError as error:
        raise PhatgooseError(f"cannot read {path}: {reason_of(error)}") from error


def folder_digests(folder: Path, patterns: Iterable[str] = ("*",)) -> list[list[str]]:
    """Return name and SHA-256 of all files below a folder that match one of these patterns.

    What git and the hub's client keep beside the data is left out.
    """
    files = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return [
        [str(path.relative_to(folder)), file_digest(path)]
        for path in sorted(files)
        if not {".git", ".cache", "__pycache__"} & {*path.relative_to(folder).parts}
    ]


@lru_cache(maxsize=2**16)
def _digest(path: str, stamp: tuple[int, ...]) -> str:
    """SHA-256 of a file, once in a process for each state of it."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
