"""Check that one machine packs the experts of a bucket, and that the others fetch the pack."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.registry import Registry, bucket_packs, packs
from harness.registry.bucket_packs import BucketPack
from harness.registry.gc import collect
from harness.registry.packs import open_pool, open_single, pool_id
from harness.registry.verify import Check, verify
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.pool import Pool
from tests.support import processes
from tests.support.registries import BASE, make_expert
from tests.support.s3_server import S3Server

EXPERTS = 4


@pytest.fixture
def registry(s3: S3Server, tmp_path: Path) -> Registry:
    registry = Registry(s3.uri(f"{tmp_path.name}/pool"), BASE)
    for number in range(EXPERTS):
        registry.publish(make_expert(number, value=number + 1.0))
    return registry


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_packs, "_POLL_SECONDS", 0.01)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that moves this process to a machine with this name and its own cache."""

    def go(name: str) -> Path:
        cache = tmp_path / name
        monkeypatch.setenv("PHATGOOSE_CACHE", str(cache))
        return cache / "packs"

    go("first")
    return go


class Loads(list[str]):
    """A function that loads experts, and the hashes it was called with."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __call__(self, content: str) -> Expert:
        self.append(content)
        return self._registry.load(content)


def opened(registry: Registry, load: Callable[[str], Expert]) -> Pool:
    pool = open_pool(registry, registry.manifest().experts, load)
    assert pool.experts == tuple(f"task-{number}" for number in range(EXPERTS))
    A_ERD = pool.linears["layers.0.q"].lora_A_ERD
    assert torch.equal(A_ERD[:, 0, 0], torch.arange(1.0, EXPERTS + 1))
    return pool


def place(registry: Registry) -> str:
    return f"packs/{pool_id(registry.manifest().experts)}"


def files(registry: Registry) -> dict[str, bytes]:
    """Return the contents of the files of the pack in the bucket, by name."""
    names = registry.folder.names("packs/")
    return {name.removeprefix(f"{place(registry)}/"): registry.folder.read(name) for name in names}


def damage(registry: Registry, name: str, change: Callable[[bytes], bytes]) -> None:
    file = f"{place(registry)}/{name}"
    registry.folder.write(file, change(registry.folder.read(file)))


def never(content: str) -> Expert:
    raise AssertionError("its pack is in the bucket")


def test_a_pack_is_made_once_and_fetched_once(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(registry, loads := Loads(registry))
    assert loads == list(registry.manifest().experts.values())
    stored = files(registry)
    assert stored.keys() == {"pool.safetensors", "pack.json"}
    cache = machine("second")
    opened(registry, never)
    (folder,) = cache.glob("[!.]*")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == stored
    # It was verified while it was fetched.
    with monkeypatch.context() as here:
        here.setattr(packs, "_hash", lambda *_: pytest.fail("it was verified"))
        here.setattr(Folder, "read_chunks", lambda *_: pytest.fail("it is here"))
        opened(registry, never)
        assert open_single(registry, "task-2", registry.find("task-2")) is not None
    assert not list(cache.glob(".*.tmp"))
    assert verify(registry.folder, every_manifest=True) == Check(EXPERTS)


def _open(barrier: Any, uri: str, cache: str, loads: Any, fetches: Any) -> None:
    os.environ["PHATGOOSE_CACHE"] = cache
    bucket_packs._POLL_SECONDS = 0.05
    registry, read = Registry(uri, BASE), Folder.read_chunks

    def load(content: str) -> Expert:
        loads.put(content)
        return registry.load(content)

    def noting(folder: Folder, name: str) -> Iterator[bytes]:
        fetches.put(cache)
        return read(folder, name)

    Folder.read_chunks = noting  # type: ignore[assignment,method-assign]
    barrier.wait(120)
    opened(registry, load)


@pytest.mark.slow
def test_of_many_processes_one_packs_and_one_per_machine_fetches(
    registry: Registry, tmp_path: Path
) -> None:
    caches = [str(tmp_path / name) for name in ("a", "a", "b", "b", "c")]
    barrier = processes.CONTEXT.Barrier(len(caches))
    loads, fetches = processes.CONTEXT.Queue(), processes.CONTEXT.Queue()
    calls = [(barrier, registry.folder.uri, cache, loads, fetches) for cache in caches]
    started = processes.start(_open, *calls)
    for process in started:
        process.join(timeout=240)
    assert [process.exitcode for process in started] == [0] * len(caches)
    assert sorted(loads.get() for _ in range(EXPERTS)) == sorted(
        registry.manifest().experts.values()
    )
    assert loads.empty()
    fetched = [fetches.get(), fetches.get()]
    assert len({*fetched}) == 2
    assert fetches.empty()
    assert files(registry).keys() == {"pool.safetensors", "pack.json"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pool.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("pool.safetensors", lambda data: data[:-8]),
        ("pack.json", lambda data: data.replace(b"task-1", b"task-9")),
        ("pack.json", lambda data: b"[]"),
    ],
    ids=["flip", "cut", "other index", "no index"],
)
def test_a_damaged_pack_is_never_used_and_made_again(
    registry: Registry,
    machine: Callable[[str], Path],
    name: str,
    change: Callable[[bytes], bytes],
) -> None:
    opened(registry, registry.load)
    stored = files(registry)
    damage(registry, name, change)
    (problem,) = verify(registry.folder).problems
    assert f"{place(registry)}/{name}" in problem
    assert "the next run that needs the pack makes it again" in problem
    machine("second")
    opened(registry, loads := Loads(registry))
    assert len(loads) == EXPERTS
    assert files(registry) == stored
    assert verify(registry.folder).problems == []
    machine("third")
    opened(registry, never)


def test_a_damaged_file_is_fetched_once(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(registry, registry.load)
    damage(registry, "pool.safetensors", lambda data: data[:-1])
    machine("second")
    fetched: list[str] = []
    read = Folder.read_chunks

    def noting(folder: Folder, name: str) -> Iterator[bytes]:
        fetched.append(name)
        return read(folder, name)

    monkeypatch.setattr(Folder, "read_chunks", noting)
    opened(registry, registry.load)
    assert fetched == [f"{place(registry)}/pool.safetensors"]


def test_a_pack_that_is_there_is_not_stored_again(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(registry, registry.load)
    (folder,) = machine("first").glob("[!.]*")
    before = registry.folder.entries("packs/")
    monkeypatch.setattr(Folder, "write_chunks", lambda *_: pytest.fail("it is there"))
    BucketPack(registry.folder, folder.name, packs._code()).put(folder, lambda: None)
    assert registry.folder.entries("packs/") == before


@pytest.mark.parametrize("missing", ["pool.safetensors", "pack.json"])
def test_an_incomplete_pack_is_made_again(
    registry: Registry, machine: Callable[[str], Path], missing: str
) -> None:
    opened(registry, registry.load)
    stored = files(registry)
    registry.folder.delete(f"{place(registry)}/{missing}")
    machine("second")
    opened(registry, loads := Loads(registry))
    assert len(loads) == EXPERTS
    assert files(registry) == stored
    machine("third")
    opened(registry, never)


def test_a_pack_of_other_code_is_replaced(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(packs, "_code", lambda: "0" * 16)
        opened(registry, registry.load)
    assert json.loads(files(registry)["pack.json"])["code"] == "0" * 16
    machine("second")
    opened(registry, loads := Loads(registry))
    assert len(loads) == EXPERTS
    assert json.loads(files(registry)["pack.json"])["code"] == packs._code()


def test_the_claim_of_a_dead_machine_is_taken_over(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.folder.create(f"{place(registry)}/claim.json", b"somebody")
    monkeypatch.setattr(bucket_packs, "_STALE_SECONDS", 0.0)
    opened(registry, loads := Loads(registry))
    assert len(loads) == EXPERTS
    assert files(registry).keys() == {"pool.safetensors", "pack.json"}


def test_a_claim_that_is_renewed_is_respected(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check with a clock on which every look is half of the patience later."""
    claim = f"{place(registry)}/claim.json"
    clock = iter(range(10**6))
    registry.folder.create(claim, b"somebody 0")
    monkeypatch.setattr(bucket_packs, "_STALE_SECONDS", 1.5)
    monkeypatch.setattr(bucket_packs.time, "monotonic", lambda: float(next(clock)))
    turns: list[int] = []

    def beat() -> None:
        turns.append(len(turns))
        if len(turns) < 5:
            registry.folder.write(claim, f"somebody {len(turns)}".encode())
        elif len(turns) == 5:
            registry.folder.delete(claim)

    with BucketPack(registry.folder, place(registry)[6:], "code").claimed(beat):
        assert len(turns) == 5
        assert json.loads(registry.folder.read(claim))["count"] == 0
    assert not registry.folder.exists(claim)


def test_whoever_makes_a_pack_renews_the_claim(
    registry: Registry, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_packs, "_RENEW_SECONDS", -1.0)
    claims: list[bytes] = []
    write = Folder.write

    def noting(folder: Folder, name: str, data: bytes) -> None:
        if name.endswith("claim.json"):
            claims.append(data)
        write(folder, name, data)

    monkeypatch.setattr(Folder, "write", noting)
    opened(registry, registry.load)
    counts = [json.loads(claim)["count"] for claim in claims]
    assert counts == list(range(1, len(counts) + 1))
    assert len(counts) > EXPERTS
    assert len({json.loads(claim)["owner"] for claim in claims}) == 1


@pytest.mark.parametrize("refused", ["create", "write", "write_chunks"])
def test_a_bucket_that_takes_no_pack_does_no_harm(
    registry: Registry,
    machine: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    refused: str,
) -> None:
    def refuse(*_: Any) -> None:
        raise PhatgooseError("read-only")

    monkeypatch.setattr(Folder, refused, refuse)
    opened(registry, loads := Loads(registry))
    opened(registry, never)
    assert len(loads) == EXPERTS
    assert verify(registry.folder).problems == []


def test_gc_keeps_packs_of_existing_experts_and_removes_others(
    registry: Registry, machine: Callable[[str], Path]
) -> None:
    pool = registry.manifest().experts
    opened(registry, registry.load)
    fewer = {name: pool[name] for name in ("task-2", "task-3")}
    open_pool(registry, fewer, registry.load)
    whole, part = f"packs/{pool_id(pool)}", f"packs/{pool_id(fewer)}"
    registry.folder.write(f"{part}/claim.json", b"a dead machine's")
    registry.folder.write(f"packs/{'0' * 16}/pool.safetensors", b"without an index")

    def removed(**options: Any) -> set[str]:
        return {g.file for g in collect(registry.folder, **options)}

    assert removed() == set()  # too recent
    left = {f"{part}/claim.json", f"packs/{'0' * 16}/pool.safetensors"}
    assert removed(older_than=-60) == left
    registry.remove("task-1")
    gone = removed(older_than=-60, keep_manifests=1)
    assert {name for name in gone if name.startswith("packs/")} == {
        f"{whole}/pool.safetensors",
        f"{whole}/pack.json",
    }
    assert registry.folder.names("packs/") == [f"{part}/pack.json", f"{part}/pool.safetensors"]
    assert verify(registry.folder).problems == []


def test_verify_finds_a_pack_without_its_file(
    registry: Registry, machine: Callable[[str], Path]
) -> None:
    opened(registry, registry.load)
    registry.folder.delete(f"{place(registry)}/pool.safetensors")
    (problem,) = verify(registry.folder).problems
    assert problem.endswith(f"{place(registry)} is incomplete: delete it, or run `gc`")
