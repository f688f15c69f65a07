"""Remove what no manifest and no record names: `python -m harness.registry gc`.

Garbage is: objects that neither a manifest nor a job's record names, profiles of deleted objects,
packs that hold such an object or are incomplete, and files that a killed writer left. With
`keep_manifests`, older manifests go first, and then what only they named. A record stays, and its
object too: the job is finished, and the next run adds it to the pool.

Files younger than `older_than` stay, because a run may be about to name them. An older object may
still be named concurrently, when a run makes the same expert again. Therefore:

1. Who makes an expert again writes its object again, so it is young.
2. Objects are listed again just before they are deleted, and those written meanwhile stay.
3. Deleted objects are held in memory until the records and manifests have been read once more, and
   are written back if one of these names them.
4. `Registry.put_record` checks that the object exists after writing the record. If it does not,
   `publish` writes it again, and a training job runs again.

The later of the last two sees what the other one did. If gc is killed at that moment, a job's
record may be left without its object, and the next run trains that expert again.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.registry.bucket_packs import CLAIM_FILE, bucket_pack_experts
from harness.registry.files import (
    job_files,
    manifest_file,
    manifest_numbers,
    object_file,
    object_files,
    profile_files,
    read_manifest,
    read_records,
)
from harness.registry.packs import LOCK, read_index
from harness.storage import Folder
from harness.storage.stores import Entry
from phatgoose.errors import PhatgooseError
from phatgoose.files import TEMPORARY

DAY = 86400.0
# Bytes of objects deleted between two readings of the names; they are held in memory.
_BATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Garbage:
    """A file to be removed, its size in bytes, and why nothing needs it."""

    file: str
    bytes: int
    why: str


def collect(
    folder: Folder,
    *,
    keep_manifests: int | None = None,
    older_than: float = DAY,
    dry_run: bool = False,
) -> list[Garbage]:
    """Remove the garbage of a registry; return what was removed.

    Args:
        folder: of the registry.
        keep_manifests: how many of the newest manifests stay; all if None.
        older_than: files written within this many seconds stay.
        dry_run: remove nothing; return what would be removed.

    Raises:
        PhatgooseError: a manifest or record cannot be read, so what it names is unknown.
    """
    if keep_manifests is not None and keep_manifests < 1:
        raise PhatgooseError(f"keep_manifests is {keep_manifests}: at least the newest must stay")
    before = time.time() - older_than
    files = {entry.path: entry for entry in folder.entries(hidden=True)}
    old = {path: entry for path, entry in files.items() if entry.modified < before}
    names = _Names(folder, set(_old_manifests(folder, keep_manifests)) & old.keys())
    named = names.read()
    objects = set(object_files(folder))
    unnamed = [old[file] for file in sorted(objects - named) if file in old]
    removed = [_garbage(old[f], "an old manifest") for f in sorted(names.without)]
    if dry_run:
        removed += [_garbage(entry, _NO_NAME) for entry in unnamed]
    else:
        for file in sorted(names.without):
            folder.delete(file, missing_ok=True)
        removed += _remove_objects(folder, unnamed, names)
    rest = list(_rest(folder, old, objects - {garbage.file for garbage in removed}))
    if not dry_run:
        for garbage in rest:
            folder.remove_left_over(garbage.file)
            _remove_if_empty(folder, garbage.file)
    return removed + rest


_NO_NAME = "no manifest or record names it"


def _garbage(entry: Entry, why: str) -> Garbage:
    return Garbage(entry.path, entry.size, why)


def _old_manifests(folder: Folder, keep: int | None) -> list[str]:
    numbers = manifest_numbers(folder)
    return [] if keep is None else [manifest_file(number) for number in numbers[:-keep]]


class _Names:
    """The objects that the manifests and records name, read again as often as needed."""

    def __init__(self, folder: Folder, without: set[str]) -> None:
        """Ignore the manifests `without`."""
        self.without = without
        self._folder = folder
        self._read: dict[str, tuple[float, set[str]]] = {}  # by file: when written, what it names

    def read(self) -> set[str]:
        """Return the files of all objects that are named now; read only what changed."""
        folder = self._folder
        for number in manifest_numbers(folder):
            file = manifest_file(number)
            if file not in self.without and file not in self._read:
                contents = read_manifest(folder, number).experts.values()
                self._read[file] = 0.0, set(map(object_file, contents))
        written = {entry.path: entry.modified for entry in folder.entries("jobs/")}
        records = set(job_files(folder)) & written.keys()
        new = [f for f in records if self._read.get(f, (None,))[0] != written[f]]
        for file, record in read_records(folder, new):
            if isinstance(record, PhatgooseError):
                raise record
            self._read[file] = written[file], {object_file(record.object)} if record else set()
        return set().union(*(named for _, named in self._read.values()))


def _remove_objects(folder: Folder, entries: Sequence[Entry], names: _Names) -> Iterator[Garbage]:
    """Delete objects and yield them; what is named by now is written back instead."""
    for batch in _batches(entries):
        kept = names.read()
        written = {entry.path: entry.modified for entry in folder.entries("objects/")}
        kept |= {entry.path for entry in batch if written.get(entry.path) != entry.modified}
        deleted: dict[str, bytes] = {}
        for entry in batch:
            data = None if entry.path in kept else folder.find(entry.path)
            if data is not None:
                deleted[entry.path] = data
                folder.delete(entry.path, missing_ok=True)
        for file in names.read() & deleted.keys():
            folder.create(file, deleted.pop(file))
        yield from (_garbage(entry, _NO_NAME) for entry in batch if entry.path in deleted)


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    for entry in entries:
        if batch and sum(e.size for e in batch) + entry.size > _BATCH_BYTES:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def _rest(folder: Folder, old: dict[str, Entry], objects: set[str]) -> Iterator[Garbage]:
    """Yield the garbage that is neither an object nor a manifest."""
    for profile in profile_files(folder):
        if profile.file in old and object_file(profile.expert) not in objects:
            yield _garbage(old[profile.file], "its expert was deleted")
    lost: dict[str, bool] = {}
    for path, entry in old.items():
        first, _, below = path.partition("/")
        if any(TEMPORARY.fullmatch(part) for part in path.split("/")):
            yield _garbage(entry, "left by a process that was killed")
        elif first == "packs" and below.endswith((LOCK, f"/{CLAIM_FILE}")):
            yield _garbage(entry, "left by a process that made a pack")
        elif match := re.fullmatch(r"packs/([0-9a-f]{16})/.*", path):
            pack = match[1]
            if pack not in lost:
                lost[pack] = _is_lost(folder, pack, objects)
            if lost[pack]:
                yield _garbage(entry, "an incomplete pack, or one of deleted experts")
        elif re.fullmatch(r"check-[0-9a-f]{32}", path):
            yield _garbage(entry, "left by a process that was killed")


def _remove_if_empty(folder: Folder, file: str) -> None:
    """Remove the folders of a pack whose last file is gone."""
    packs = folder.local("packs")
    if packs is None or not file.startswith("packs/"):
        return
    with contextlib.suppress(OSError):  # it holds something
        for parent in (packs.parent / file).parents:
            if parent == packs:
                return
            parent.rmdir()


def _is_lost(folder: Folder, pack: str, objects: set[str]) -> bool:
    """Return whether a pack is incomplete, or holds an expert that was deleted."""
    path = folder.local(f"packs/{pack}")
    with contextlib.suppress(PhatgooseError):
        # The file of a pack in a bucket is not read: it may be large, and who fetches it does.
        experts = bucket_pack_experts(folder, pack) if path is None else read_index(path).values()
        return experts is None or not {*map(object_file, experts)} <= objects
    return True
