import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.registry import Registry, packs
from harness.registry.pack_index import INDEX_FILE, POOL_FILE
from harness.registry.packs import open_pool, open_single, pool_id, read_index
from harness.storage import Folder
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from tests.support import processes
from tests.support.registries import BASE, make_expert
from tests.support.small_disk import small_disk


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    registry = Registry(tmp_path / "pool", BASE)
    for number in range(4):
        registry.publish(make_expert(number, value=number + 1.0))
    return registry


def folder_of(registry: Registry) -> Path:
    packs = registry.folder.local("packs")
    assert packs is not None
    return packs / pool_id(registry.manifest().experts)


def check(pool: Any) -> None:
    assert pool.experts == tuple(f"task-{number}" for number in range(4))
    A_ERD = pool.linears["layers.0.q"].lora_A_ERD
    assert torch.equal(A_ERD[:, 0, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_pack_is_made_once(registry: Registry) -> None:
    experts = registry.manifest().experts
    check(open_pool(registry, experts, registry.load))

    def never(content: str) -> Expert:
        raise AssertionError("it is there already")

    check(open_pool(registry, experts, never))
    names = {path.name for path in folder_of(registry).parent.iterdir()}
    assert names - {f".{folder_of(registry).name}.lock"} == {folder_of(registry).name}


def test_experts_that_cannot_be_mapped_are_copied_for_a_while(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check as on a node that reads a bucket, or that gets experts from the registry actor."""
    experts = registry.manifest().experts
    loads: list[str] = []

    def load(content: str) -> Expert:
        loads.append(content)
        return registry.load(content)

    check(open_pool(registry, experts, registry.load))
    packs_here = folder_of(registry).parent
    expected = (folder_of(registry) / POOL_FILE).read_bytes()
    shutil.rmtree(packs_here)
    monkeypatch.setattr(Folder, "local", lambda *_: None)
    saved: list[Path] = []
    save = Expert.save

    def noting(expert: Expert, path: Path) -> None:
        saved.append(path)
        save(expert, path)

    monkeypatch.setattr(Expert, "save", noting)
    check(open_pool(registry, experts, load))
    assert loads == [path.name for path in saved] == list(experts.values())
    (found,) = (cache_dir() / "packs").glob("[!.]*")
    assert found != packs_here / found.name
    assert {path.name for path in found.iterdir()} == {POOL_FILE, INDEX_FILE}
    assert (found / POOL_FILE).read_bytes() == expected
    assert not list((cache_dir() / "packs").glob(".*.tmp"))


def test_nothing_is_written_to_another_disk_under_the_registry_s_path(
    registry: Registry, tmp_path: Path
) -> None:
    """Check as on a node that gets experts from the registry actor."""
    experts = registry.manifest().experts
    for name in ("nothing", "another"):
        there = Registry(tmp_path / name, BASE)
        if name == "another":
            there.publish(make_expert(9))
        before = there.folder.names()
        for load in (registry.load, pytest.fail):
            check(open_pool(there, experts, load))
        single = open_single(there, "task-2", experts["task-2"])
        assert single is not None
        assert there.folder.names() == before
        assert not (tmp_path / name / "packs").exists()
        (folder,) = (cache_dir() / "packs").glob("[!.]*")
        shutil.rmtree(folder)
    # A registry that lost some objects is still the registry.
    registry.folder.delete(f"objects/{experts['task-0']}.arrow")
    check(open_pool(registry, experts, lambda content: made()[content]))
    assert folder_of(registry).exists()


def made() -> dict[str, Expert]:
    experts = [make_expert(number, value=number + 1.0) for number in range(4)]
    return {expert.content_hash(): expert for expert in experts}


@pytest.mark.parametrize("damage", ["flip", "cut", "no index", "no file", "other index", "empty"])
def test_a_damaged_or_stale_pack_is_made_again(registry: Registry, damage: str) -> None:
    experts = registry.manifest().experts
    open_pool(registry, experts, registry.load)
    folder = folder_of(registry)
    file, index = folder / POOL_FILE, folder / INDEX_FILE
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-8])
    elif damage == "no index":
        index.unlink()
    elif damage == "no file":
        file.unlink()
    elif damage == "other index":
        index.write_text(index.read_text().replace("task-1", "task-9"))
    else:
        file.unlink()
        index.unlink()
    with pytest.raises(
        PhatgooseError, match=r"is not an intact pack .*the next run .* makes it again"
    ):
        read_index(folder)
    check(open_pool(registry, experts, registry.load))
    assert list(read_index(folder).items()) == list(experts.items())


@pytest.mark.parametrize("code", ["0" * 16, None], ids=["other", "of 0.1.0"])
def test_a_pack_made_by_other_code_is_made_again(registry: Registry, code: str | None) -> None:
    experts = registry.manifest().experts
    open_pool(registry, experts, registry.load)
    index = folder_of(registry) / INDEX_FILE
    before = json.loads(index.read_bytes())
    rest = {name: value for name, value in before.items() if name not in ("code", "sha256")}
    if code is not None:
        rest["code"] = code
        text = json.dumps(rest, sort_keys=True)
        rest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    index.write_text(json.dumps(rest))
    assert list(read_index(folder_of(registry))) == list(experts)  # it is complete
    loaded = []

    def load(content: str) -> Expert:
        loaded.append(content)
        return registry.load(content)

    check(open_pool(registry, experts, load))
    assert loaded == list(experts.values())
    assert json.loads(index.read_bytes())["code"] == before["code"]


def test_a_pack_is_read_once_per_machine(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = registry.manifest().experts
    read: list[Path] = []

    def hash_file(path: Path, beat: Any) -> str:
        read.append(path)
        return whole(path, beat)

    whole = packs._hash
    monkeypatch.setattr(packs, "_hash", hash_file)
    open_pool(registry, experts, registry.load)
    file = folder_of(registry) / POOL_FILE
    made = len(read)
    assert made == 1  # while it was made
    for _ in range(3):
        check(open_pool(registry, experts, registry.load))
    assert len(read) == made
    monkeypatch.setattr(packs, "MACHINE", "another")
    check(open_pool(registry, experts, registry.load))
    assert read[made:] == [file]
    read_index(folder_of(registry))  # as `verify` does
    assert read[made:] == [file, file]


@pytest.mark.parametrize("change", ["in place", "another file"])
def test_a_verified_pack_that_was_changed_is_made_again(registry: Registry, change: str) -> None:
    """Check that neither the size nor the time of the last change hides it."""
    experts = registry.manifest().experts
    check(open_pool(registry, experts, registry.load))
    file = folder_of(registry) / POOL_FILE
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    if change == "in place":
        file.write_bytes(data)
    else:
        other = file.with_name("other")
        other.write_bytes(data)
        other.replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    loaded: list[str] = []

    def load(content: str) -> Expert:
        loaded.append(content)
        return registry.load(content)

    check(open_pool(registry, experts, load))
    assert loaded == list(experts.values())


@pytest.mark.parametrize("note", [b"", b"[]", b'{"file": []}'])
def test_a_damaged_note_of_a_verified_pack_does_no_harm(registry: Registry, note: bytes) -> None:
    experts = registry.manifest().experts
    check(open_pool(registry, experts, registry.load))
    (path,) = (cache_dir() / "verified").iterdir()
    path.write_bytes(note)
    check(open_pool(registry, experts, registry.load))


def test_a_pack_that_another_process_damages_at_once_is_still_used(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check what may happen where there are no locks."""

    def damage(new: Path, folder: Path) -> None:
        new.rename(folder)
        (folder / POOL_FILE).unlink()

    monkeypatch.setattr(packs, "_rename_unless_there", damage)
    experts = registry.manifest().experts
    check(open_pool(registry, experts, registry.load))


def test_an_expert_that_cannot_be_read_leaves_no_pack(registry: Registry) -> None:
    experts = registry.manifest().experts
    registry.folder.delete(f"objects/{experts['task-2']}.arrow")
    with pytest.raises(PhatgooseError, match="is missing: start the run again"):
        open_pool(registry, experts, registry.load)
    packs = folder_of(registry).parent
    assert [path for path in packs.iterdir() if not path.name.endswith(".lock")] == []


def _open_repeatedly(uri: str, number: int, failures: Any) -> None:
    """Open a pack repeatedly; sometimes damage or delete it before."""
    try:
        registry = Registry(uri, BASE)
        experts = registry.manifest().experts
        file = folder_of(registry) / POOL_FILE
        for turn in range(12):
            check(open_pool(registry, experts, registry.load))
            if turn % 3 == number:
                try:
                    if turn % 2:
                        file.unlink()
                    else:  # a new file in its place, because maps of the old one are in use
                        other = file.with_name(f"other-{number}")
                        other.write_bytes(file.read_bytes()[:-1])
                        other.replace(file)
                except FileNotFoundError:
                    pass  # another process was faster
        failures.put(None)
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.parametrize("with_locks", [True, False])
def test_no_process_reads_a_partially_written_pack(
    registry: Registry, with_locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_locks:
        monkeypatch.setenv("TEST_PACK_WITHOUT_LOCKS", "1")
    failures = processes.CONTEXT.Queue()
    calls = [(registry.folder.uri, number, failures) for number in range(3)]
    openers = processes.start(_opener, *calls)
    assert [failures.get(timeout=240) for _ in openers] == [None] * 3
    for opener in openers:
        opener.join(60)
    check(open_pool(registry, registry.manifest().experts, registry.load))
    assert not list(folder_of(registry).parent.glob(".*.tmp"))


def _opener(uri: str, number: int, failures: Any) -> None:
    if "TEST_PACK_WITHOUT_LOCKS" in os.environ:
        from harness.registry import packs as pack

        def refuse(*_: Any, **__: Any) -> None:
            raise NotImplementedError("no locks here")

        pack.FileLock = refuse  # type: ignore[assignment]
    _open_repeatedly(uri, number, failures)


def _note_loads(uri: str, loads: Any) -> None:
    registry = Registry(uri, BASE)

    def load(content: str) -> Expert:
        loads.put(content)
        return registry.load(content)

    check(open_pool(registry, registry.manifest().experts, load))
    loads.put("done")


def test_one_process_makes_a_pack_and_the_others_wait(registry: Registry) -> None:
    loads = processes.CONTEXT.Queue()
    openers = processes.start(_note_loads, *[(registry.folder.uri, loads)] * 3)
    said: list[str] = []
    while said.count("done") < 3:
        said.append(loads.get(timeout=120))
    for opener in openers:
        opener.join(60)
    assert len(said) - 3 == 4


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "pool" / "packs", "8k") as disk:
        yield disk


def test_a_full_disk_gives_a_one_line_error(registry: Registry, small: Path) -> None:
    (small / "fill").write_bytes(bytes(8000))
    with pytest.raises(PhatgooseError, match=r"^cannot write the pack .* \(.*No space.*\): free"):
        open_pool(registry, registry.manifest().experts, registry.load)
    assert not [path for path in small.iterdir() if path.name.endswith(".tmp")]
