"""A folder on shared storage: local, S3, Google Cloud Storage, Azure, or any pyarrow filesystem.

On all of them a file appears completely or not at all. Hidden files are never listed, so the
remains of a killed writer on a local disk are never taken for a file. `harness.storage.cleanup`
deletes them.
"""

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import starmap
from pathlib import Path

import obstore.exceptions
import pyarrow as pa
from pyarrow import fs

from harness.storage.object_store import SCHEMES, open_store
from harness.storage.stores import ArrowStore, Entry, LocalStore, Store
from phatgoose.errors import FIXES, PhatgooseError, reason_of

# Exceptions that the stores and their libraries raise.
_REFUSALS = (OSError, NotImplementedError, pa.ArrowException, obstore.exceptions.BaseError)
# Concurrent requests to an object store. Each waits for the network most of the time.
_READERS = 16


class Folder:
    """A folder given by a path or a URI such as `s3://bucket/pool`. Its files have relative names.

    Every method raises PhatgooseError with the name of the file if the filesystem fails or the name
    would lead out of the folder. The first write creates the folder itself.
    """

    def __init__(self, uri: str | Path) -> None:
        """Open the folder at `uri`. A relative path is relative to the working directory."""
        self.uri = str(uri) if "://" in str(uri) else str(Path(uri).expanduser().absolute())
        try:
            self._store, root = _open(self.uri)
        except (*_REFUSALS, ValueError) as error:
            reason = reason_of(error) if isinstance(error, ValueError) else type(error).__name__
            raise PhatgooseError(
                f"cannot open the folder {_without_secrets(self.uri)} ({reason}). "
                "Use a path, or a URI such as file:///data/pool or s3://bucket/pool."
            ) from error
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._store, LocalStore)

    def __str__(self) -> str:
        """Return the path or URI without a password."""
        return _without_secrets(self.uri)

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        """Pickle by URI: another process opens the folder again."""
        return Folder, (self.uri,)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        full = self._full(name)
        with self._named_errors("read", name):
            return self._store.read(full)

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes of a file from `start`. All of them must be within the file."""
        full = self._full(name)
        with self._named_errors("read", name):
            data = self._store.read_part(full, start, length) if length else b""
            if len(data) != length:
                raise OSError(f"it has {len(data)} of the {length} bytes from {start}")
        return data

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        """Yield `read_part` of each name, start and length, in order; read concurrently."""
        if self._is_local:
            yield from starmap(self.read_part, parts)
            return
        with ThreadPoolExecutor(_READERS) as readers:
            yield from readers.map(lambda part: self.read_part(*part), parts)

    def find(self, name: str) -> bytes | None:
        """Return the bytes of a file, or None if there is no such file."""
        full = self._full(name)
        with self._named_errors("read", name):
            try:
                return self._store.read(full)
            except FileNotFoundError:
                return None

    def find_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | PhatgooseError | None]]:
        """Find many small files concurrently; yield names and results of `find` in order.

        If a file cannot be read, its result is the error.
        """

        def find(name: str) -> tuple[str, bytes | PhatgooseError | None]:
            try:
                return name, self.find(name)
            except PhatgooseError as error:
                return name, error

        if self._is_local:
            yield from map(find, names)
            return
        with ThreadPoolExecutor(_READERS) as readers:
            yield from readers.map(find, names)

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        full = self._full(name)
        with self._named_errors("write", name):
            self._store.write(full, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file atomically unless it exists; return whether this call created it.

        Of any number of concurrent callers, in any process on any machine, exactly one creates it.
        A store without this guarantee is rejected by `check_writable` or here.
        """
        full = self._full(name)
        with self._named_errors("create", name):
            return self._store.create(full, data)

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a large file in pieces."""
        full = self._full(name)
        with self._named_errors("read", name):
            yield from self._store.read_chunks(full)

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a large file atomically from its pieces, replacing an existing one."""
        full = self._full(name)
        with self._named_errors("write", name):
            self._store.write_chunks(full, chunks)

    def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Delete a file. With `missing_ok`, it may be missing."""
        full = self._full(name)
        with self._named_errors("delete", name):
            try:
                self._store.delete(full)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_left_over(self, path: str) -> None:
        """Delete a file that `entries` listed, even a hidden one. It may already be deleted."""
        with self._named_errors("delete", path), suppress(FileNotFoundError):
            self._store.delete(f"{self._root}/{path}")

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""
        full = self._full(name)
        with self._named_errors("check for", name):
            return self._store.exists(full)

    def names(self, prefix: str = "") -> list[str]:
        """Return the sorted names of all files that start with `prefix`, except hidden files.

        Subfolders are included. For a prefix such as `jobs/a`, only the folder `jobs` is read.
        """
        return [entry.path for entry in self.entries(prefix)]

    def entries(self, prefix: str = "", *, hidden: bool = False) -> list[Entry]:
        """Return the files of `names` with size and time. With `hidden`, include hidden files."""
        folder = prefix.rpartition("/")[0]
        start = self._full(folder) if folder else self._root
        with self._named_errors("list", folder):
            found = list(self._store.entries(start))
        named = (replace(e, path=e.path.removeprefix(self._root).lstrip("/")) for e in found)
        wanted = [e for e in named if e.path.startswith(prefix)]
        if not hidden:
            wanted = [e for e in wanted if not _has_hidden_part(e.path)]
        return sorted(wanted, key=lambda entry: entry.path)

    def path(self, name: str) -> str:
        """Return the full path of a local file, or the URI of any other file."""
        full = self._full(name)
        if self._is_local:
            return full
        folder, question_mark, options = self.uri.partition("?")
        return f"{folder.rstrip('/')}/{name}{question_mark}{options}"

    def local(self, name: str) -> Path | None:
        """Return the path of a file on the local filesystem; None on any other."""
        full = self._full(name)
        return Path(full) if self._is_local else None

    def check_writable(self, *, creates: bool = True) -> None:
        """Write and delete a small file; raise PhatgooseError if that fails.

        Args:
            creates: also check that a second `create` of the file fails. A registry needs this.
        """
        name = f"check-{uuid.uuid4().hex}"
        if not creates:
            self.write(name, b"can this folder be written to?")
            self.delete(name)
            return
        self.create(name, b"can this folder be written to?")
        try:
            if self.create(name, b"and is a second one refused?"):
                raise PhatgooseError(
                    f"{self} overwrites existing files on a conditional write, so two runs could "
                    "overwrite each other's experts. Use a store with conditional writes (S3's "
                    "If-None-Match), or a local or network folder."
                )
        finally:
            self.delete(name, missing_ok=True)

    def _full(self, name: str) -> str:
        if not name or _has_hidden_part(name) or "\\" in name or "\0" in name:
            raise PhatgooseError(
                f"{name!r} is not a file name in {self}. Use a relative name without hidden parts."
            )
        return f"{self._root}/{name}"

    @contextmanager
    def _named_errors(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except _REFUSALS as error:
            place = f"{self}/{name}".rstrip("/")
            raise PhatgooseError(
                f"cannot {action} {place} ({reason_of(error, first_line=True)}): {_fix(error)}"
            ) from error


def _open(uri: str) -> tuple[Store, str]:
    """Return the store that a path or URI names, and the path in it."""
    if uri.partition("://")[0] in SCHEMES:
        return open_store(uri)
    filesystem, root = fs.FileSystem.from_uri(uri)
    local = isinstance(filesystem, fs.LocalFileSystem)
    return (LocalStore() if local else ArrowStore(filesystem)), root


def _fix(error: BaseException) -> str:
    if isinstance(error, NotImplementedError):
        return "keep the registry in a local or network folder, on S3, GCS or Azure"
    kind = type(error).__name__
    if number := getattr(error, "errno", None):
        return FIXES.get(number, "check the folder and the name")
    if kind in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError"):
        return "check the credentials and their permissions"
    if kind == "GenericError":
        return "check the address, the credentials and that the bucket exists, then try again"
    return "check the folder and the name"


def _has_hidden_part(name: str) -> bool:
    """Return whether a part of `name` is empty or starts with a dot (absolute, hidden, . or ..)."""
    return any(not part or part.startswith(".") for part in name.split("/"))


def _without_secrets(uri: str) -> str:
    """Return the URI without `user:password@` and without options."""
    if "://" not in uri:
        return uri
    return re.sub("://[^/]*@", "://", uri.partition("?")[0])
