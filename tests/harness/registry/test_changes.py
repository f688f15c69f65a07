"""Check remove and rename: their effects, interruptions, and concurrent writers."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.registry import Registry
from harness.registry.files import Manifest, Record
from harness.storage import Folder
from phatgoose.card import with_job
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from tests.support.registries import BASE, make_expert


@pytest.fixture(params=["local", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "pool" if request.param == "local" else "memory:///pool", BASE)


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "pool", BASE)


def test_remove_deletes_the_job_record_and_keeps_the_object(registry: Registry) -> None:
    expert, other = make_expert(1), make_expert(2)
    content_hash, stays = registry.publish(expert), registry.publish(other)
    assert registry.remove("task-1") == content_hash
    assert registry.manifest() == Manifest(3, 2, BASE, {"task-2": stays})
    assert registry.finished(expert.card.job) is None
    assert registry.finished(other.card.job) == stays
    assert registry.manifest().number == 3
    assert registry.load(content_hash).card == expert.card

    files = registry.folder.names()
    assert registry.remove("task-1") is None
    assert registry.folder.names() == files

    again = registry.publish(make_expert(1, value=2.0))  # trained again, with other weights
    assert again != content_hash
    assert registry.experts(["task-1", "task-2"]) == {"task-1": again, "task-2": stays}
    assert registry.finished(expert.card.job) == again


def test_remove_works_if_the_object_is_damaged(local: Registry) -> None:
    content_hash = local.publish(make_expert(1))
    local.folder.write(f"objects/{content_hash}.arrow", b"half")
    assert local.remove("task-1") == content_hash
    assert local.finished(make_expert(1).card.job) is None


def test_rename_changes_the_name_and_the_job(registry: Registry) -> None:
    old, other = make_expert(1, name="old"), make_expert(2)
    old_hash, stays = registry.publish(old), registry.publish(other)
    new_hash = registry.rename("old", "new")

    assert registry.manifest() == Manifest(3, 2, BASE, {"new": new_hash, "task-2": stays})
    renamed = registry.load(new_hash)
    assert renamed.card.name == "new"
    assert renamed.card.task == old.card.task
    for linear, factors in old.linears.items():
        for field, tensor in factors.tensors():
            assert torch.equal(getattr(renamed.linears[linear], field), tensor)
    # It has a separate job: a run that needs `old` must never get an expert named `new`.
    assert renamed.card.job != old.card.job
    assert registry.finished(renamed.card.job) == new_hash
    assert registry.recorded(old.card.job) is None
    assert registry.load(old_hash).card == old.card  # older manifests name it

    assert registry.publish(old) == old_hash
    assert registry.manifest().experts == {"new": new_hash, "old": old_hash, "task-2": stays}


def test_renaming_an_imported_adapter_equals_importing_it_under_the_new_name(
    local: Registry,
) -> None:
    def imported(name: str) -> Expert:
        expert = make_expert(1, name=name)
        return replace(expert, card=with_job(expert.card, expert.linears))

    first = local.publish(imported("old"))
    renamed = local.rename("old", "new")
    assert renamed == imported("new").content_hash()
    number = local.manifest().number
    assert local.publish(imported("new"), replace=False) == renamed
    assert local.manifest().number == number
    assert local.rename("new", "old") == first


def test_rename_refusals_change_nothing(registry: Registry) -> None:
    registry.publish(make_expert(1))
    registry.publish(make_expert(2))
    files = registry.folder.names()
    for old, new, message in [
        ("task-1", "task-2", "has an expert task-2: choose another name"),
        ("task-1", "task-1", "has an expert task-1"),
        ("task-3", "new", r"no experts task-3: did you mean task-1, task-2\?"),
        ("task-1", "../new", "cannot name an expert"),
    ]:
        with pytest.raises(PhatgooseError, match=message):
            registry.rename(old, new)
    assert registry.folder.names() == files


class Died(BaseException):
    """Raised like kill -9: the tested code does not catch it."""


@pytest.mark.parametrize("change", ["remove", "rename"])
@pytest.mark.parametrize("crash_at", range(5))
def test_an_interrupted_change_is_completed_by_repeating_it(
    local: Registry, monkeypatch: pytest.MonkeyPatch, change: str, crash_at: int
) -> None:
    """Die before each write or delete in turn; between the two calls, the job is requested."""
    job = make_expert(1, name="old").card.job
    local.publish(make_expert(1, name="old"))

    def call() -> None:
        if change == "remove":
            local.remove("old")
        else:
            local.rename("old", "new")

    steps = 0
    with monkeypatch.context() as patch:
        for method in ("write", "create", "delete"):
            original = getattr(Folder, method)

            def dying(*args: object, _original: Callable = original, **options: object) -> object:
                nonlocal steps
                steps += 1
                if steps > crash_at:
                    raise Died
                return _original(*args, **options)

            patch.setattr(Folder, method, dying)
        with contextlib.suppress(Died):
            call()
    seems_done = "old" not in local.manifest().experts
    local.finished(job)  # a run that starts in the meantime
    if not seems_done:
        call()

    assert local.finished(job) is None
    assert list(local.manifest().experts) == (["new"] if change == "rename" else [])


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_a_running_driver_does_not_restore_removed_experts(
    local: Registry, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Read the record, then remove the expert in another process, then try to register it."""
    job = make_expert(1, name="old").card.job
    local.publish(make_expert(1, name="old"))
    enter = Registry._add_to_manifest

    def remove_first(self: Registry, records: dict[str, Record], replace: bool = True) -> None:
        monkeypatch.setattr(Registry, "_add_to_manifest", enter)
        if change == "remove":
            local.remove("old")
        else:
            local.rename("old", "new")
        enter(self, records, replace)

    monkeypatch.setattr(Registry, "_add_to_manifest", remove_first)
    local.finished(job)
    assert "old" not in local.manifest().experts
    assert local.finished(job) is None


def _together(*calls: Callable[[], object]) -> None:
    """Run these calls in threads that start at the same moment; re-raise an error."""
    barrier, errors = threading.Barrier(len(calls)), []

    def run(call: Callable[[], object]) -> None:
        barrier.wait(60)
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors


def test_concurrent_removes_renames_and_publishes_lose_nothing(local: Registry) -> None:
    for number in range(20):
        local.publish(make_expert(number))

    def remove() -> None:
        for number in range(10):
            local.remove(f"task-{number}")

    def rename() -> None:
        for number in range(10, 20):
            local.rename(f"task-{number}", f"new-{number}")

    def publish() -> None:
        for number in range(20, 30):
            local.publish(make_expert(number))

    _together(remove, remove, rename, publish)
    expected = {f"new-{number}" for number in range(10, 20)}
    expected |= {f"task-{number}" for number in range(20, 30)}
    assert set(local.manifest().experts) == expected
    for name, content_hash in local.manifest().experts.items():
        assert local.load(content_hash).card.name == name
    for number in range(20):
        assert local.finished(make_expert(number).card.job) is None


def test_an_expert_removed_and_published_concurrently_is_consistent(local: Registry) -> None:
    """Check that the pool and the job's record agree, whichever came last."""
    expert = make_expert(1)
    for _ in range(10):
        local.publish(expert)
        _together(
            lambda: [local.publish(expert) for _ in range(3)],
            lambda: [local.remove("task-1") for _ in range(3)],
        )
        content_hash = local.finished(expert.card.job)
        expected = {} if content_hash is None else {"task-1": content_hash}
        assert local.manifest().experts == expected
