"""Packs: a pool's experts stacked into one file that all actors of a machine map.

    packs/<id>/pool.safetensors   the pool; the id is a hash over its experts
    packs/<id>/pack.json          which experts those are, see `harness.registry.pack_index`

A registry in a bucket has the same files there, see `harness.registry.bucket_packs`, and every
machine has a copy in its cache.

A pack can be made again from the registry's objects at any time. A pack that is truncated, altered,
or made by other code is not used but made again.

A machine reads a whole pack once to verify it, and notes in the cache which file that was. The
processes that open the same file afterwards only map it.

Shape suffixes: D input and O output features of a linear, E experts, R rank.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from harness.registry import Registry
from harness.registry.bucket_packs import BucketPack
from harness.registry.files import object_file
from harness.registry.pack_index import INDEX_FILE, POOL_FILE, PackIndex, pool_id
from harness.source_code import code_of, digest
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.expert import Expert
from phatgoose.files import MACHINE, replacing, temporary_name
from phatgoose.pool import Pool, PoolLinear

LOCK = ".lock"  # suffix of the hidden files by which one process makes others wait
# A process that has waited this long for another's pack makes its own.
_WAIT_SECONDS = 1800.0
_BEAT_SECONDS = 5.0
_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Members:
    """The experts of a pool: content hash by name, and profile id by name if profiles count."""

    experts: Mapping[str, str]
    profiles: Mapping[str, str] | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What identifies a pool, including the order that `==` of dictionaries ignores."""
        return tuple(self.experts.items()), self.profiles and tuple(self.profiles.items())


def open_pool(
    registry: Registry,
    experts: Mapping[str, str],
    load: Callable[[str], Expert],
    beat: Callable[[], None] = lambda: None,
) -> Pool:
    """Map the pack of these experts, after making it if this machine does not have it.

    It is stored in the registry if that is a local folder that this machine sees, and in the cache
    otherwise. If the registry is in a bucket, it is stored there too, or fetched from there. Of
    several processes that need it at once, one makes it and the others wait. If the filesystem has
    no locks, each makes it, without disturbing the others.

    Args:
        registry: where the experts are stored.
        experts: content hash by name, in the pool's order.
        load: reads and verifies the expert of a hash; maps its file if this machine has it.
        beat: called regularly, as a heartbeat.

    Raises:
        PhatgooseError: an expert cannot be read, or the pack cannot be written.
    """
    packs = _place(registry, experts)
    folder = packs / pool_id(experts)
    pool = _open_whole(folder, beat)
    if pool is None:
        try:
            packs.mkdir(parents=True, exist_ok=True)
            with _alone(packs / f".{folder.name}{LOCK}", beat):
                pool = _open_whole(folder, beat)  # another process may have made it meanwhile
                if pool is None:
                    pool = _make(folder, registry, experts, load, beat)
        except (OSError, SafetensorError) as error:
            raise PhatgooseError(
                f"cannot write the pack {folder} ({reason_of(error)}): free some space there, or "
                "make the folder writable"
            ) from error
    return pool


def _place(registry: Registry, experts: Mapping[str, str]) -> Path:
    """Return the folder of this machine's packs of a registry.

    A machine may have another disk under the path of a local registry. It gets the experts from the
    registry actor, and must not write there.
    """
    packs = registry.folder.local("packs")
    if packs is None:
        return cache_dir() / "packs"
    is_here = (packs / pool_id(experts)).exists() or any(map(registry.has, experts.values()))
    return packs if is_here else cache_dir() / "packs"


def open_single(
    registry: Registry, name: str, content: str, beat: Callable[[], None] = lambda: None
) -> Pool | None:
    """Return one expert as a view of a pack that this machine has, as a pool of its own.

    Its tensors equal those of the expert's object bit by bit. Return None if there is no such pack,
    or if the pack may hold the expert otherwise: padded to a larger rank, in a wider dtype, or
    without its gates.

    Args:
        registry: where the experts are stored.
        name: the name of the expert.
        content: its content hash.
        beat: called regularly, as a heartbeat.
    """
    roots = (registry.folder.local("packs"), cache_dir() / "packs")
    folders = (folder for root in roots if root for folder in pack_folders(root.parent))
    found = [folder for folder in folders if _names(folder, name, content)]
    # To verify a pack that was never read here takes as long as to read all its experts.
    for folder in sorted(found, key=lambda folder: not _is_noted(folder / POOL_FILE)):
        pool = _open_whole(folder, beat)
        if pool is not None:
            return _single(pool, name)
    return None


def _names(folder: Path, name: str, content: str) -> bool:
    """Return whether a pack's index names this expert; the pack may still be damaged."""
    try:
        return [name, content] in json.loads((folder / INDEX_FILE).read_bytes())["experts"]
    except (OSError, LookupError, TypeError, ValueError):
        return False


def _single(pool: Pool, name: str) -> Pool | None:
    """Return a view of one expert; None if it may differ from a pool of its object."""
    index = pool.index(name)
    linears = {}
    for linear, stacked in sorted(pool.linears.items()):  # the order of an expert's file
        if stacked.absent_E is not None and stacked.absent_E[index]:
            continue
        own = slice(index, index + 1)
        lora_A_ERD, gate_ED = stacked.lora_A_ERD[own], stacked.gate_ED
        if lora_A_ERD.dtype != torch.float32 or gate_ED is None or not lora_A_ERD[0, -1].any():
            return None
        linears[linear] = PoolLinear(lora_A_ERD, stacked.lora_B_EOR[own], gate_ED[own])
    return Pool(pool.base_fingerprint, (name,), linears)


def read_index(folder: Path, beat: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Return the experts of a pack: content hash by name.

    Raises PhatgooseError, naming the file, if the pack is damaged.
    """
    return _read_index(folder, lambda file: _hash(file, beat)).experts


def _read_index(folder: Path, content_of: Callable[[Path], str]) -> PackIndex:
    """Return the index of an intact pack."""
    try:
        index = PackIndex.from_bytes((folder / INDEX_FILE).read_bytes(), folder.name)
        if content_of(folder / POOL_FILE) != index.content:
            raise ValueError(f"{POOL_FILE} was altered or truncated")
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise PhatgooseError(
            f"{folder} is not an intact pack ({reason_of(error)}): delete it, or leave it; the "
            "next run that needs it makes it again"
        ) from error
    return index


def pack_folders(registry: Path) -> list[Path]:
    """Return the folders of all packs in a local registry."""
    packs = registry / "packs"
    found = packs.iterdir() if packs.is_dir() else iter(())
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def _open_whole(folder: Path, beat: Callable[[], None]) -> Pool | None:
    """Return the pack if it exists and is intact."""
    try:
        index = _read_index(folder, lambda file: _hash_once(file, beat))
        if index.code != _code():
            return None
        pool = Pool.open(folder)
    except (PhatgooseError, OSError, RuntimeError, SafetensorError):  # truncated in the meantime
        return None
    return pool if pool.experts == tuple(index.experts) else None


def _make(
    folder: Path,
    registry: Registry,
    experts: Mapping[str, str],
    load: Callable[[str], Expert],
    beat: Callable[[], None],
) -> Pool:
    """Write a pack beside its place and move it there complete; replace a damaged one.

    The pool returned is mapped before it is moved: without locks, another process may move the pack
    away again.
    """
    temporary = folder.with_name(temporary_name())
    temporary.mkdir()
    try:
        new, old = temporary / "new", temporary / "old"
        if registry.folder.local("packs"):
            content = _pack(new, registry, experts, load, beat)
        else:
            bucket = BucketPack(registry.folder, folder.name, _code())
            content = bucket.fetch(new, beat) or _pack_once(
                bucket, new, lambda beat: _pack(new, registry, experts, load, beat), beat
            )
        for path in (new, new / INDEX_FILE):
            path.chmod(0o755 if path.is_dir() else 0o644)  # others may map it too
        pool = Pool.open(new)
        _note_hash(folder / POOL_FILE, _identity(new / POOL_FILE), content)
        if folder.exists() and _open_whole(folder, beat) is None:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
        _rename_unless_there(new, folder)
        return pool
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pack_once(
    bucket: BucketPack,
    new: Path,
    pack: Callable[[Callable[[], None]], str],
    beat: Callable[[], None],
) -> str:
    """Make a pack and store it in the bucket, unless another machine does so meanwhile."""
    with bucket.claimed(beat) as beat:
        content = bucket.fetch(new, beat)
        if content is None:
            content = pack(beat)
            bucket.put(new, beat)
    return content


def _pack(
    new: Path,
    registry: Registry,
    experts: Mapping[str, str],
    load: Callable[[str], Expert],
    beat: Callable[[], None],
) -> str:
    """Write the files of a pack into a folder; return the hash of the pool's file.

    Experts are read from mapped files, so that they need not fit into memory.
    """
    with tempfile.TemporaryDirectory(dir=new.parent) as copies:
        mapped = []
        for content in experts.values():
            mapped.append(_mapped(registry, content, load, Path(copies)))
            beat()
        Pool.write(mapped, new, beat)
    content = _hash(new / POOL_FILE, beat)
    (new / INDEX_FILE).write_bytes(PackIndex(dict(experts), content, _code()).to_bytes())
    return content


def _mapped(
    registry: Registry, content: str, load: Callable[[str], Expert], folder: Path
) -> Expert:
    """Return an expert that is mapped: from the registry's file, or from a copy in a folder."""
    expert, local = load(content), registry.folder.local(object_file(content))
    if local and local.exists():
        return expert
    expert.save(folder / content)
    return Expert.load(folder / content)


@functools.cache
def _code() -> str:
    """Return a digest of the source code that stacks experts and reads them."""
    return digest(code_of(["phatgoose.pool"]))


def _rename_unless_there(new: Path, folder: Path) -> None:
    try:
        new.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        # else a process on another machine was first, and its pack is the same


@contextlib.contextmanager
def _alone(lock: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Exclude the other processes of this machine; proceed without a lock if locks do not work."""
    ends = time.monotonic() + _WAIT_SECONDS
    with contextlib.ExitStack() as held:
        while time.monotonic() < ends:
            try:
                held.enter_context(FileLock(lock, timeout=_BEAT_SECONDS))
                break
            except Timeout:
                beat()
            except (OSError, NotImplementedError):
                break
        yield


def _hash_once(path: Path, beat: Callable[[], None]) -> str:
    """Return the hash of a file, from the cache if this machine has read the same file before."""
    file = _identity(path)
    content = _noted(path, file)
    if content is None:
        content = _hash(path, beat)
        _note_hash(path, file, content)
    return content


def _noted(path: Path, file: list[str | int]) -> str | None:
    """Return the hash of a file if this machine has read it before."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        noted = json.loads(_note_of(path).read_bytes())
        if noted["file"] == file:
            return str(noted["xxh3_128"])
    return None


def _is_noted(path: Path) -> bool:
    return path.exists() and _noted(path, _identity(path)) is not None


def _identity(path: Path) -> list[str | int]:
    """Return what changes when a file is written to, or another one put in its place."""
    found = path.stat()
    return [
        MACHINE,
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    ]


def _note_of(path: Path) -> Path:
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    return cache_dir() / "verified" / f"{name}.json"


def _note_hash(path: Path, file: list[str | int], content: str) -> None:
    """Note for this machine's processes what the file that is or will be there hashes to."""
    note = _note_of(path)
    with contextlib.suppress(OSError):  # the next process reads the file again
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as temporary:
            temporary.write_text(json.dumps({"file": file, "xxh3_128": content}))


def _hash(path: Path, beat: Callable[[], None]) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            beat()
    return state.hexdigest()
