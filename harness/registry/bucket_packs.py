"""Packs in a bucket: one machine packs a pool's experts, and the others fetch the pack.

    packs/<id>/pool.safetensors, packs/<id>/pack.json   as in a local registry
    packs/<id>/claim.json                               who is making the pack, and a count

The index is written last, so a pack without it is incomplete. Who makes the pack rewrites the claim
from time to time. If a claim does not change for a while, by the clock of who waits, its owner is
taken for dead. Two machines that make a pack at once do no harm: they write the same files.
"""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from harness.registry.pack_index import INDEX_FILE, POOL_FILE, PackIndex
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.files import replacing

CLAIM_FILE = "claim.json"
_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 2.0
_RENEW_SECONDS = 10.0
_STALE_SECONDS = 120.0
_CHUNK_BYTES = 32 * 2**20


class BucketPack:
    """The place of a pack in a registry that is in a bucket.

    Args:
        folder: the registry's folder.
        pack: the id of the pack.
        code: the digest that the pack's code must have.
    """

    def __init__(self, folder: Folder, pack: str, code: str) -> None:
        self._folder, self._pack, self._code = folder, pack, code
        self._damaged: PackIndex | None = None  # the index of a pack whose file is damaged

    def fetch(self, new: Path, beat: Callable[[], None]) -> str | None:
        """Fetch the pack into a local folder; return the hash of its file.

        Return None, and leave no file, if there is no pack that can be used.
        """
        index = None
        try:
            index = self._index()
            if index is None or index.code != self._code or index == self._damaged:
                return None
            new.mkdir(parents=True, exist_ok=True)
            state = xxhash.xxh3_128()
            with replacing(new / POOL_FILE) as temporary:
                with temporary.open("wb") as file:
                    for chunk in self._folder.read_chunks(self._file(POOL_FILE)):
                        state.update(chunk)
                        file.write(chunk)
                        beat()
                if state.hexdigest() != index.content:
                    raise PhatgooseError(f"{POOL_FILE} was altered or truncated")
        except PhatgooseError as error:
            _LOG.warning("the pack %s in %s is not used: %s", self._pack, self._folder, error)
            self._damaged = index
            return None
        (new / INDEX_FILE).write_bytes(index.to_bytes())
        return index.content

    def put(self, new: Path, beat: Callable[[], None]) -> None:
        """Store the pack of a local folder, unless the bucket has it; log what prevents it.

        A pack that `fetch` found damaged is replaced.
        """
        try:
            mine = PackIndex.from_bytes((new / INDEX_FILE).read_bytes(), self._pack)
            with contextlib.suppress(PhatgooseError):  # a damaged index is replaced
                there = self._index() == mine and self._folder.exists(self._file(POOL_FILE))
                if there and mine != self._damaged:
                    return
            self._folder.write_chunks(self._file(POOL_FILE), _chunks(new / POOL_FILE, beat))
            self._folder.write(self._file(INDEX_FILE), mine.to_bytes())
        except PhatgooseError as error:
            _LOG.warning("the pack %s stays on this machine: %s", self._pack, error)

    @contextlib.contextmanager
    def claimed(self, beat: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Exclude other machines that claim the pack; yield a heartbeat that renews the claim.

        Return without the claim if another machine stored the pack, or if there can be no claims.
        """
        me, file = uuid.uuid4().hex, self._file(CLAIM_FILE)
        count, renewed = 0, time.monotonic()

        def renew() -> None:
            nonlocal count, renewed
            beat()
            if time.monotonic() - renewed > _RENEW_SECONDS:
                count, renewed = count + 1, time.monotonic()
                with contextlib.suppress(PhatgooseError):  # others may then make it too
                    self._folder.write(file, _claim(me, count))

        try:
            mine = self._wait(me, beat)
        except PhatgooseError as error:
            _LOG.warning("the pack %s is made without a claim: %s", self._pack, error)
            mine = False
        try:
            yield renew if mine else beat
        finally:
            if mine:
                with contextlib.suppress(PhatgooseError):  # it is stale soon
                    self._folder.delete(file, missing_ok=True)

    def _wait(self, me: str, beat: Callable[[], None]) -> bool:
        """Claim the pack, once nobody else does; return False if the bucket has it by then."""
        file = self._file(CLAIM_FILE)
        seen, since = None, time.monotonic()
        while not self._folder.create(file, _claim(me, 0)):
            claim = self._folder.find(file)
            if claim != seen:
                seen, since = claim, time.monotonic()
            elif time.monotonic() - since > _STALE_SECONDS:
                self._folder.write(file, _claim(me, 0))
                return True
            with contextlib.suppress(PhatgooseError):  # a damaged index will be replaced
                index = self._index()
                if index is not None and index.code == self._code:
                    return False
            beat()
            time.sleep(_POLL_SECONDS)
        return True

    def _file(self, name: str) -> str:
        return f"packs/{self._pack}/{name}"

    def _index(self) -> PackIndex | None:
        """Return the index in the bucket, or None; raise PhatgooseError if it is damaged."""
        return read_bucket_index(self._folder, self._pack)


def read_bucket_index(folder: Folder, pack: str) -> PackIndex | None:
    """Return the index of a pack in a bucket, or None if there is none.

    Raises PhatgooseError, naming the file, if it is damaged.
    """
    name = f"packs/{pack}/{INDEX_FILE}"
    data = folder.find(name)
    if data is None:
        return None
    try:
        return PackIndex.from_bytes(data, pack)
    except (LookupError, TypeError, ValueError) as error:
        raise PhatgooseError(
            f"{folder}/{name} is damaged ({error}): delete it, or leave it; the next run that "
            "needs the pack makes it again"
        ) from error


def bucket_pack_experts(folder: Folder, pack: str, *, reads: bool = False) -> set[str] | None:
    """Return the content hashes of the experts of a pack in a bucket; None if it is incomplete.

    Args:
        folder: the registry's folder.
        pack: the id of the pack.
        reads: also read the pool's file, and compare its hash.

    Raises:
        PhatgooseError: it is damaged.
    """
    index, file = read_bucket_index(folder, pack), f"packs/{pack}/{POOL_FILE}"
    if index is None or not folder.exists(file):
        return None
    if reads:
        state = xxhash.xxh3_128()
        for chunk in folder.read_chunks(file):
            state.update(chunk)
        if state.hexdigest() != index.content:
            raise PhatgooseError(
                f"{folder}/{file} was altered or truncated: delete it, or leave it; the next run "
                "that needs the pack makes it again"
            )
    return set(index.experts.values())


def _claim(owner: str, count: int) -> bytes:
    return json.dumps({"owner": owner, "count": count}).encode()


def _chunks(path: Path, beat: Callable[[], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
            beat()
