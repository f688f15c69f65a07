"""A folder on any filesystem that pyarrow opens: local, S3, Google Cloud Storage, HDFS.

A local file appears whole or not at all, and stays after a power cut: it is written under a hidden
name, flushed, renamed, and its folder is flushed too. Hidden files are never listed, so what a
killed writer leaves behind is never taken for a file; harness/leftovers.py removes it.
"""

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from harness.leftovers import temporary_name
from phatgoose.errors import PhatgooseError

_MENDS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to, with hard links",
    errno.EOPNOTSUPP: "choose a folder whose filesystem has hard links",
    errno.EROFS: "choose a folder that you may write to",
}


class Folder:
    """A folder, given by a path or a URI such as `s3://bucket/pool`; files in it by relative name.

    Every method raises PhatgooseError, naming the file, for what the filesystem refuses and for
    names that would lead out of the folder. The folder itself is made by the first write.
    """

    def __init__(self, uri: str | Path) -> None:
        """Open the folder at `uri`; a relative path is taken from the working directory."""
        self.uri = str(uri) if "://" in str(uri) else str(Path(uri).expanduser().absolute())
        try:
            self._fs, root = fs.FileSystem.from_uri(self.uri)
        except (OSError, pa.ArrowException) as error:
            raise PhatgooseError(
                f"cannot open the folder {_without_secrets(self.uri)} ({type(error).__name__}): "
                "use a path, or a URI such as file:///data/pool or s3://bucket/pool"
            ) from error
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    def __str__(self) -> str:
        """The path or URI, without a password."""
        return _without_secrets(self.uri)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        with self._named_errors("read", name), self._fs.open_input_file(self._full(name)) as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Write one file whole, over the one that may be there."""
        with self._named_errors("write", name):
            if self._is_local:
                _write_local(Path(self._full(name)), data, os.replace)
            else:
                self._put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write one file whole if none is there; say whether this call made it."""
        with self._named_errors("create", name):
            if self._is_local:
                try:
                    _write_local(Path(self._full(name)), data, os.link)
                except FileExistsError:
                    return False
                return True
            # Not atomic: of two writers at the same moment, the later one wins.
            if self.exists(name):
                return False
            self._put(name, data)
            return True

    def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Delete one file; with `missing_ok` it may be gone already."""
        full = self._full(name)
        with self._named_errors("delete", name):
            try:
                self._fs.delete_file(full)
            except FileNotFoundError:
                if not missing_ok:
                    raise
                return
            if self._is_local:
                _flush_folder(Path(full).parent)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        with self._named_errors("look for", name):
            return self._fs.get_file_info(self._full(name)).type == fs.FileType.File

    def names(self, prefix: str = "") -> list[str]:
        """The sorted names of all files whose name starts with `prefix`, hidden ones left out.

        Folders below are read too. Of a prefix such as `jobs/a`, only the folder `jobs` is read.
        """
        folder = prefix.rpartition("/")[0]
        start = self._full(folder) if folder else self._root
        with self._named_errors("list", folder):
            infos = self._fs.get_file_info(
                fs.FileSelector(start, recursive=True, allow_not_found=True)
            )
        files = (info.path for info in infos if info.type == fs.FileType.File)
        names = (path.removeprefix(self._root).lstrip("/") for path in files)
        return sorted(n for n in names if n.startswith(prefix) and not _has_hidden_part(n))

    def path(self, name: str) -> str:
        """The full path (local) or URI (elsewhere) of a file."""
        full = self._full(name)
        if self._is_local:
            return full
        folder, question_mark, options = self.uri.partition("?")
        return f"{folder.rstrip('/')}/{name}{question_mark}{options}"

    def local(self, name: str) -> Path | None:
        """The path of a file on the local filesystem, None on any other."""
        full = self._full(name)
        return Path(full) if self._is_local else None

    def check_writable(self) -> None:
        """Make and delete a small file; raise PhatgooseError if that does not work."""
        name = f"check-{uuid.uuid4().hex}"
        self.create(name, b"can this folder be written to?")
        self.delete(name)

    def _full(self, name: str) -> str:
        if not name or _has_hidden_part(name) or "\\" in name or "\0" in name:
            raise PhatgooseError(
                f"{name!r} is no file name in {self}: use a relative one without hidden parts"
            )
        return f"{self._root}/{name}"

    def _put(self, name: str, data: bytes) -> None:
        full = self._full(name)
        self._fs.create_dir(full.rpartition("/")[0], recursive=True)
        with self._fs.open_output_stream(full, compression=None) as file:
            file.write(data)

    @contextmanager
    def _named_errors(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number else str(error).partition("\n")[0][:200]
            mend = _MENDS.get(number or 0, "check the folder and the name")
            place = f"{self}/{name}".rstrip("/")
            raise PhatgooseError(f"cannot {action} {place} ({reason}): {mend}") from error


def _has_hidden_part(name: str) -> bool:
    """Whether a part of `name` is empty or starts with a dot: absolute, hidden, '.' or '..'."""
    return any(not part or part.startswith(".") for part in name.split("/"))


def _without_secrets(uri: str) -> str:
    """The URI without `user:password@` and without options."""
    if "://" not in uri:
        return uri
    return re.sub("://[^/]*@", "://", uri.partition("?")[0])


def _write_local(path: Path, data: bytes, place: Callable[[Path, Path], None]) -> None:
    """Write a hidden file, flush it, and `place` it (rename or link) at `path`."""
    _make_folder(path.parent)
    temporary = path.with_name(temporary_name())
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
