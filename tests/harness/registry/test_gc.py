"""Check what gc removes and what it never removes, even with concurrent writers."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.registry import Registry, gc
from harness.registry.__main__ import main
from harness.registry.files import Record, object_file, profile_file
from harness.registry.gc import DAY, collect
from harness.registry.packs import open_pool
from harness.registry.verify import Check, verify
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from tests.support.registries import BASE, make_expert

ID = "0123456789abcdef"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Make a registry of task-1, task-2 and task-3."""
    registry = Registry(tmp_path / "pool", BASE)
    for number in (1, 2, 3):
        registry.publish(make_expert(number))
    return registry


def store(registry: Registry, expert: Expert) -> str:
    """Store only an expert's object, as an interrupted publish does; return its file."""
    file = object_file(expert.content_hash())
    registry.folder.write(file, expert.to_bytes())
    return file


def age(registry: Registry) -> None:
    """Set the time of all files to two days ago."""
    then = time.time() - 2 * DAY
    for parent, _, files in os.walk(registry.folder.uri):
        for file in files:
            os.utime(Path(parent) / file, (then, then))


def files(registry: Registry) -> set[str]:
    return {entry.path for entry in registry.folder.entries(hidden=True)}


def removed(registry: Registry, **options: object) -> set[str]:
    return {garbage.file for garbage in collect(registry.folder, **options)}  # type: ignore[arg-type]


def test_a_registry_in_use_has_no_garbage(registry: Registry) -> None:
    registry.remove("task-1")  # older manifests name it
    registry.publish(make_expert(4), add_to_manifest=False)  # finished, and not registered yet
    registry.put_profile(registry.find("task-2"), ID, b"a profile")
    age(registry)
    before = files(registry)
    assert removed(registry) == set()
    assert files(registry) == before
    assert registry.finished(make_expert(4).card.job) == registry.find("task-4")


def test_garbage_is_removed_when_it_is_old(registry: Registry, tmp_path: Path) -> None:
    kept = files(registry)
    orphan = make_expert(9)
    garbage = {
        store(registry, orphan): orphan.to_bytes(),
        profile_file(orphan.content_hash(), ID): b"a profile",
        f"check-{'0' * 32}": b"",
        f"objects/.host-7-{'1' * 32}.tmp": b"half",
        f"packs/.host-7-{'1' * 32}.tmp/new/pool.safetensors": b"half",
        "packs/.0123456789abcdef.lock": b"",
        "packs/0123456789abcdef/pool.safetensors": b"no index",
    }
    for file, data in garbage.items():
        path = tmp_path / "pool" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "pool/objects/notes.txt").write_text("somebody's own file")
    assert removed(registry) == set()  # too recent
    age(registry)
    registry.folder.write("check-" + "2" * 32, b"")  # a run that starts at this moment
    kept |= {"objects/notes.txt", "check-" + "2" * 32}

    told = collect(registry.folder, dry_run=True)
    assert {g.file for g in told} == garbage.keys()
    assert {g.file: g.bytes for g in told} == {file: len(data) for file, data in garbage.items()}
    assert files(registry) == kept | garbage.keys()
    assert collect(registry.folder) == told
    assert files(registry) == kept
    assert not (tmp_path / "pool/packs/0123456789abcdef").exists()
    assert verify(registry.folder) == Check(3)


def test_old_manifests_and_objects_that_only_they_name_are_removed(registry: Registry) -> None:
    gone = registry.remove("task-1")
    assert gone is not None
    registry.put_profile(gone, ID, b"a profile")
    age(registry)
    assert removed(registry, keep_manifests=2) == {"manifests/1.json", "manifests/2.json"}
    assert registry.load(gone).card.name == "task-1"  # manifest 3 names it
    expected = {"manifests/3.json", object_file(gone), profile_file(gone, ID)}
    assert removed(registry, keep_manifests=1, dry_run=True) == expected
    assert removed(registry, keep_manifests=1) == expected
    assert set(registry.manifest().experts) == {"task-2", "task-3"}
    assert registry.publish(make_expert(1)) == gone
    assert registry.manifest().number == 5
    assert verify(registry.folder, every_manifest=True) == Check(3)
    with pytest.raises(PhatgooseError, match="at least the newest must stay"):
        collect(registry.folder, keep_manifests=0)


def test_a_pack_is_removed_with_its_experts(registry: Registry, tmp_path: Path) -> None:
    pool = registry.manifest().experts
    open_pool(registry, pool, registry.load)
    open_pool(registry, {name: pool[name] for name in ("task-2", "task-3")}, registry.load)
    registry.remove("task-1")
    age(registry)
    assert all(file.endswith(".lock") for file in removed(registry))
    assert len(list((tmp_path / "pool/packs").glob("[!.]*"))) == 2
    collect(registry.folder, keep_manifests=1)
    assert len(list((tmp_path / "pool/packs").glob("[!.]*"))) == 1
    assert verify(registry.folder) == Check(2)


@pytest.mark.parametrize("file", ["manifests/1.json", "manifests/3.json", "jobs/{}.json"])
def test_gc_refuses_if_it_cannot_tell_what_is_named(registry: Registry, file: str) -> None:
    store(registry, make_expert(9))
    registry.folder.write(file.format(make_expert(1).card.job), b"{")
    age(registry)
    before = files(registry)
    with pytest.raises(PhatgooseError, match=r"is malformed .*delete it"):
        collect(registry.folder)
    assert files(registry) == before


@pytest.mark.parametrize("moment", ["listed", "read", "deleted", "looked again"])
@pytest.mark.parametrize("enter", [False, True])
def test_an_object_published_again_during_gc_is_not_lost(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, moment: str, enter: bool
) -> None:
    """Check a publish that finds the old object at every moment of a gc; the object must stay."""
    expert = make_expert(9)
    file = store(registry, expert)
    age(registry)
    find, delete, names = Folder.find, Folder.delete, Folder.names

    def publish() -> None:
        monkeypatch.undo()
        registry.publish(expert, add_to_manifest=enter)

    def before(call: Callable, when: Callable[[str], bool]) -> Callable:
        def patched(self: Folder, name: str = "", **options: object) -> object:
            if when(name):
                publish()
            return call(self, name, **options)

        return patched

    def after_delete(self: Folder, name: str, **options: bool) -> None:
        delete(self, name, **options)
        if name == file:
            publish()

    if moment == "listed":  # the objects are listed, and their names are still to be read again
        count = iter(range(9))
        again = before(names, lambda name: name == "manifests/" and next(count) == 1)
        monkeypatch.setattr(Folder, "names", again)
    elif moment == "read":  # the names were read, and the object still exists
        monkeypatch.setattr(Folder, "find", before(find, lambda name: name == file))
    elif moment == "deleted":
        monkeypatch.setattr(Folder, "delete", after_delete)
    removed(registry)
    if moment == "looked again":
        publish()
    assert registry.recorded(expert.card.job) == expert.content_hash()
    assert registry.load(expert.content_hash()).card.name == "task-9"


def test_publish_notices_that_an_existing_object_was_collected(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a complete gc after the publish wrote the object and before it wrote its record."""
    expert = make_expert(9)
    file = object_file(expert.content_hash())
    create = Folder.create

    def collect_first(self: Folder, name: str, data: bytes) -> bool:
        monkeypatch.undo()
        assert removed(registry, older_than=-60) == {file}
        return create(self, name, data)

    monkeypatch.setattr(Folder, "create", collect_first)
    registry.publish(expert)
    assert registry.load(registry.find("task-9")).card == expert.card


@pytest.mark.parametrize("moment", ["before gc", "listed"])
def test_an_object_that_was_just_written_again_stays_without_a_record(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Check an old object that nothing names, and that a training actor has just made again."""
    expert, other = make_expert(9), make_expert(10)
    store(registry, expert)
    garbage = store(registry, other)
    age(registry)
    manifest_numbers = gc.manifest_numbers

    def listed(folder: Folder) -> list[int]:
        monkeypatch.undo()
        registry.put_object(expert)
        return manifest_numbers(folder)

    if moment == "listed":  # all files with their ages, and their names are still to be read
        monkeypatch.setattr(gc, "manifest_numbers", listed)
    else:
        registry.put_object(expert)
    assert removed(registry) == {garbage}
    record = Record(expert.content_hash(), "task-9")
    assert registry.put_record(expert.card.job, record) == record
    assert registry.load(expert.content_hash()).card == expert.card


def test_an_object_without_a_record_is_an_orphan_until_its_job_is_repeated(
    registry: Registry,
) -> None:
    """Check a crash after a training actor wrote the object and before it was recorded."""
    expert = make_expert(9)
    file = object_file(registry.put_object(expert))
    assert verify(registry.folder, every_manifest=True) == Check(4, orphans=[file])
    record = Record(registry.put_object(expert), "task-9")
    assert registry.put_record(expert.card.job, record) == record
    assert registry.add_to_manifest([expert.card.job]) == {expert.card.job: record.object}
    assert verify(registry.folder, every_manifest=True) == Check(4)


def test_a_record_of_a_collected_object_is_not_valid(registry: Registry) -> None:
    expert, job = make_expert(9), make_expert(9).card.job
    record = Record(registry.put_object(expert), "task-9")
    removed(registry, older_than=-60)
    for _ in range(2):
        assert registry.put_record(job, record) is None
        assert registry.recorded(job) is None
    registry.put_object(expert)
    assert registry.put_record(job, record) == record
    # The first expert of a job counts.
    later = Record(registry.put_object(make_expert(9, value=2.0)), "task-9")
    assert registry.put_record(job, later) == record
    assert registry.finished(job) == expert.content_hash() == registry.find("task-9")


def test_gc_works_on_an_object_store(s3: object, tmp_path: Path) -> None:
    registry = Registry(s3.uri(f"{tmp_path.name}/pool"), BASE)  # type: ignore[attr-defined]
    registry.publish(make_expert(1))
    file = store(registry, make_expert(9))
    assert removed(registry) == set()
    assert removed(registry, older_than=-60) == {file}  # its clock has a resolution of seconds
    assert verify(registry.folder, every_manifest=True) == Check(1)


def test_the_gc_command_reports_and_deletes(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    file = store(registry, make_expert(9))
    age(registry)
    pool = registry.folder.uri
    assert main(["gc", pool, "--older-than", "3d"]) == 0
    assert capsys.readouterr().out == "0 files removed, 0.0 KiB\n"
    assert main(["gc", pool, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"{file}  ")
    assert lines[-1].startswith("1 file to remove, ")
    assert main(["gc", pool, "--older-than", "12h"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 file removed, ")
    with pytest.raises(SystemExit):
        main(["gc", pool, "--older-than", "soon"])
    assert "'soon': give a number and s, m, h or d, such as 1d" in capsys.readouterr().err
