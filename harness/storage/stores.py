"""Where the files of a folder are: on this machine's filesystem, in an object store, elsewhere.

All that a `Folder` needs of a place is a `Store`. Paths in it are absolute, without a leading slash
in an object store, and were checked by the folder. What a store refuses it raises as OSError or as
an exception of its library; a missing file is a FileNotFoundError.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from phatgoose.files import flush_folder, replacing


@dataclass(frozen=True)
class Entry:
    """A file in a listing.

    Attributes:
        path: where it is in its store.
        size: in bytes.
        modified: when it was last written, in seconds since 1970, by the store's own clock.
    """

    path: str
    size: int
    modified: float


class Store(Protocol):
    """What a folder needs of the place where its files are."""

    def read(self, path: str) -> bytes:
        """The bytes of a file."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole, over the one that may be there."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a file whole if none is there, also of two writers at once; say if this did."""

    def delete(self, path: str) -> None:
        """Delete a file."""

    def exists(self, path: str) -> bool:
        """Whether there is a file."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """All files below a folder, in any order, hidden ones too; none if there is no folder."""


class LocalStore:
    """The local filesystem, and network filesystems mounted there.

    A file appears whole or not at all, and stays after a power cut: it is written under a hidden
    name, flushed, renamed, and its folder is flushed too.
    """

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        return Path(path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole, over the one that may be there."""
        _write(Path(path), data, os.replace)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file whole if none is there; say whether this call made it."""
        try:
            _write(Path(path), data, _link)
        except FileExistsError:
            return False
        return True

    def delete(self, path: str) -> None:
        """Delete a file."""
        Path(path).unlink()
        flush_folder(Path(path).parent)

    def exists(self, path: str) -> bool:
        """Whether there is a file."""
        return Path(path).is_file()

    def entries(self, folder: str) -> Iterator[Entry]:
        """All files below a folder."""

        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for parent, _, names in os.walk(folder, onerror=stop):
            for name in names:
                path = f"{parent}/{name}"
                try:
                    status = os.stat(path)  # noqa: PTH116 - a Path for each is slow
                except FileNotFoundError:
                    continue  # deleted meanwhile
                yield Entry(path, status.st_size, status.st_mtime)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except OSError:
        # A network filesystem may make the link and lose the reply; a second link is the proof.
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
    """Any other filesystem that pyarrow opens, such as HDFS; none of them can create safely."""

    def __init__(self, filesystem: Any) -> None:
        self._fs = filesystem

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        with self._fs.open_input_file(path) as file:
            data: bytes = file.read()
            return data

    def write(self, path: str, data: bytes) -> None:
        """Write a file, over the one that may be there."""
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        # Without `compression=None`, a name such as x.gz would be compressed.
        with self._fs.open_output_stream(path, compression=None) as file:
            file.write(data)

    def create(self, path: str, data: bytes) -> bool:
        """Refused: of two writers at the same moment, the later one would win unseen."""
        raise NotImplementedError("this filesystem cannot create a file only if none is there")

    def delete(self, path: str) -> None:
        """Delete a file."""
        self._fs.delete_file(path)

    def exists(self, path: str) -> bool:
        """Whether there is a file."""
        return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def entries(self, folder: str) -> Iterator[Entry]:
        """All files below a folder."""
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        for info in self._fs.get_file_info(selector):
            if info.type == fs.FileType.File:
                modified = info.mtime or datetime.fromtimestamp(0)
                yield Entry(info.path, info.size, modified.timestamp())
