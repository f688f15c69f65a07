"""Storage backends of a folder: the local filesystem, an object store, or a pyarrow filesystem.

A `Folder` accesses its files through a `Store`. The folder has checked all paths. They are
absolute, without a leading slash in an object store. A store raises OSError or exceptions of its
library, and FileNotFoundError for a missing file.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from phatgoose.files import flush_folder, replacing

_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Entry:
    """A file in a listing.

    Attributes:
        path: the path within the store.
        size: the size in bytes.
        modified: the time of the last write, in seconds since 1970, by the store's own clock.
    """

    path: str
    size: int
    modified: float


class Store(Protocol):
    """The interface through which a folder accesses its files."""

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""

    def read_part(self, path: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start`, all of them within the file."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file atomically unless it exists; return whether this call created it.

        Of several concurrent writers, exactly one creates the file.
        """

    def read_chunks(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a large file in pieces."""

    def write_chunks(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a large file atomically from its pieces, replacing an existing one."""

    def delete(self, path: str) -> None:
        """Delete a file."""

    def exists(self, path: str) -> bool:
        """Return whether a file exists."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield all files below a folder in any order, including hidden ones.

        A missing folder has no files.
        """


class LocalStore:
    """The local filesystem, and network filesystems mounted there.

    A file appears completely or not at all, and survives a power failure. It is written under a
    hidden name, flushed and renamed, and then its folder is flushed.
    """

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""
        return Path(path).read_bytes()

    def read_part(self, path: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start`."""
        with Path(path).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(length)

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        _write(Path(path), data, os.replace)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file atomically unless it exists; return whether this call created it."""
        try:
            _write(Path(path), data, _link)
        except FileExistsError:
            return False
        return True

    def read_chunks(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a large file in pieces."""
        with Path(path).open("rb") as file:
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")

    def write_chunks(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a large file atomically from its pieces, replacing an existing one."""
        _make_folder(Path(path).parent)
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()

    def delete(self, path: str) -> None:
        """Delete a file."""
        Path(path).unlink()
        flush_folder(Path(path).parent)

    def exists(self, path: str) -> bool:
        """Return whether a file exists."""
        return Path(path).is_file()

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield all files below a folder."""

        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for parent, _, names in os.walk(folder, onerror=stop):
            for name in names:
                path = f"{parent}/{name}"
                try:
                    status = os.stat(path)  # noqa: PTH116 - creating a Path for each is slow
                except FileNotFoundError:
                    continue  # deleted in the meantime
                yield Entry(path, status.st_size, status.st_mtime)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError:
        # A network filesystem may create the link and lose the reply. A link count of 2 proves it.
        if temporary.stat().st_nlink < 2:
            raise


def _write(path: Path, data: bytes, publish: Callable[[Path, Path], None]) -> None:
    _make_folder(path.parent)
    with replacing(path, publish) as temporary:
        temporary.write_bytes(data)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


class ArrowStore:
    """Any other pyarrow filesystem, such as HDFS. None of them supports an atomic `create`."""

    def __init__(self, filesystem: Any) -> None:
        self._fs = filesystem

    def read(self, path: str) -> bytes:
        """Return the bytes of a file."""
        with self._fs.open_input_file(path) as file:
            data: bytes = file.read()
            return data

    def read_part(self, path: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start`."""
        with self._fs.open_input_file(path) as file:
            data: bytes = file.read_at(length, start)
            return data

    def write(self, path: str, data: bytes) -> None:
        """Write a file, replacing an existing one."""
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        # Without `compression=None`, a name such as x.gz would be compressed.
        with self._fs.open_output_stream(path, compression=None) as file:
            file.write(data)

    def create(self, path: str, data: bytes) -> bool:
        """Raise NotImplementedError: the later of two concurrent writers would silently win."""
        raise NotImplementedError("this filesystem cannot create a file only if it does not exist")

    def read_chunks(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a large file in pieces."""
        with self._fs.open_input_file(path) as file:
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")

    def write_chunks(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a large file from its pieces, replacing an existing one."""
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        with self._fs.open_output_stream(path, compression=None) as file:
            for chunk in chunks:
                file.write(chunk)

    def delete(self, path: str) -> None:
        """Delete a file."""
        self._fs.delete_file(path)

    def exists(self, path: str) -> bool:
        """Return whether a file exists."""
        return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield all files below a folder."""
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        for info in self._fs.get_file_info(selector):
            if info.type == fs.FileType.File:
                modified = info.mtime or datetime.fromtimestamp(0)
                yield Entry(info.path, info.size, modified.timestamp())
