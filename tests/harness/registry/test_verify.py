from pathlib import Path

import pytest
import torch

from harness.registry import Registry
from harness.registry.files import object_file
from harness.registry.verify import Check, verify
from tests.support.registries import BASE, make_expert


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Make a registry of task-1, task-2 and task-3."""
    registry = Registry(tmp_path / "pool", BASE)
    for number in (1, 2, 3):
        registry.publish(make_expert(number))
    return registry


def test_an_intact_registry_has_no_problems(registry: Registry) -> None:
    registry.remove("task-1")
    registry.folder.write("profiles/0123.safetensors", b"not looked at")
    registry.folder.write("objects/notes.txt", b"nor this")
    assert verify(registry.folder) == Check(2)
    assert verify(registry.folder, every_manifest=True) == Check(3)


def test_files_that_no_manifest_names_are_not_problems(registry: Registry) -> None:
    orphan = make_expert(4)
    file = object_file(orphan.content_hash())
    registry.folder.write(file, orphan.to_bytes())
    assert verify(registry.folder) == Check(3, [], [file])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "exchanged", "missing"])
def test_damage_is_found_and_the_suggested_fix_works(registry: Registry, damage: str) -> None:
    path = registry.folder.local(object_file(registry.find("task-2")))
    assert path is not None
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":  # the lowest bit of one number
        data[data.index(torch.full((2, 4), 1.0).numpy().tobytes())] ^= 1
        path.write_bytes(data)
    elif damage == "exchanged":
        path.write_bytes(make_expert(3).to_bytes())
    else:
        path.unlink()

    check = verify(registry.folder)
    assert check.objects == 3
    assert check.orphans == []
    assert check.problems[0].startswith(f"expert task-2: {path} ")
    if damage == "missing":
        assert "is missing: start the run again" in check.problems[0]
        record = registry.folder.path(f"jobs/{make_expert(2).card.job}.json")
        assert check.problems[1].startswith(f"{record} names objects/{path.name}, which is missing")
        assert len(check.problems) == 2
    else:
        assert "delete it" in check.problems[0]
        assert len(check.problems) == 1
    assert "\n" not in "".join(check.problems)

    path.unlink(missing_ok=True)
    registry.publish(make_expert(2))
    assert verify(registry.folder, every_manifest=True) == Check(3)


def test_objects_of_older_manifests_are_needed_only_when_checking_all(registry: Registry) -> None:
    gone = registry.remove("task-1")
    assert gone is not None
    registry.folder.delete(object_file(gone))
    assert verify(registry.folder) == Check(2)
    check = verify(registry.folder, every_manifest=True)
    assert len(check.problems) == 1
    path = registry.folder.path(object_file(gone))
    assert check.problems[0].startswith(f"expert task-1 of manifest 1: {path} is missing")


def test_unreadable_small_files_are_named(registry: Registry) -> None:
    job = make_expert(1).card.job
    registry.folder.write(f"jobs/{job}.json", b"{")
    registry.folder.write("manifests/2.json", b"[]")
    manifest, record = verify(registry.folder).problems
    assert f"{registry.folder}/manifests/2.json is malformed" in manifest
    assert f"{registry.folder}/jobs/{job}.json is malformed" in record
    assert "delete it" in manifest
    assert "delete it" in record
