"""Check several drivers on one registry, in a local folder and in an object store."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.registry import Registry
from harness.registry.files import Manifest, manifest_numbers, read_manifest
from harness.registry.verify import Check, verify
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from tests.support import processes
from tests.support.registries import BASE, OTHER_BASE, make_expert
from tests.support.s3_server import S3Server

EACH = 9  # experts per process


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "pool")
    server: S3Server = request.getfixturevalue("s3")
    return server.uri(f"{tmp_path.name}/pool")


def _manifests(folder: Folder) -> list[Manifest]:
    """Return all manifests, which must be numbered without gaps."""
    numbers = manifest_numbers(folder)
    manifests = [read_manifest(folder, number) for number in numbers]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [manifest.parent for manifest in manifests] == list(range(len(numbers)))
    return manifests


def _together(target: Callable[..., None], *calls: tuple[Any, ...]) -> None:
    """Run a function in several processes that start their work at the same moment."""
    barrier = processes.CONTEXT.Barrier(len(calls))
    started = processes.start(target, *[(barrier, *call) for call in calls])
    for process in started:
        process.join(timeout=240)
    assert [process.exitcode for process in started] == [0] * len(calls)


def _publish_each(barrier: Any, uri: str, first: int) -> None:
    registry = Registry(uri, BASE)
    barrier.wait(120)
    for number in [*range(first, first + EACH), 1000]:  # all publish the last one
        registry.publish(make_expert(number))


def _publish_then_register(barrier: Any, uri: str, first: int) -> None:
    registry = Registry(uri, BASE)
    experts = [make_expert(number) for number in range(first, first + EACH)]
    barrier.wait(120)
    for expert in experts:
        registry.publish(expert, add_to_manifest=False)
    registry.add_to_manifest([expert.card.job for expert in experts])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["each", "together"])
def test_processes_that_publish_concurrently_lose_nothing(uri: str, how: str) -> None:
    target = {"each": _publish_each, "together": _publish_then_register}[how]
    _together(target, *[(uri, first) for first in (0, 100, 200)])
    registry = Registry(uri, BASE)
    numbers = [first + i for first in (0, 100, 200) for i in range(EACH)]
    numbers += [1000] if how == "each" else []
    hashes = {f"task-{number}": make_expert(number).content_hash() for number in numbers}
    assert registry.manifest().experts == hashes
    assert len(registry.folder.names("objects/")) == len(hashes)
    manifests = _manifests(registry.folder)
    assert len(manifests) == (len(hashes) if how == "each" else 3)
    for before, after in itertools.pairwise(manifests):
        assert before.experts.items() < after.experts.items()
    assert verify(registry.folder, every_manifest=True) == Check(len(hashes))


def test_many_jobs_are_registered_by_one_manifest(uri: str) -> None:
    registry = Registry(uri, BASE)
    experts = [make_expert(number) for number in range(20)]
    jobs = [expert.card.job for expert in experts]
    for expert in experts[:-1]:
        registry.publish(expert, add_to_manifest=False)
    assert registry.manifest().number == 0
    expected = {e.card.job: e.content_hash() for e in experts[:-1]}
    assert registry.recorded_all(jobs) == expected
    assert registry.add_to_manifest(jobs) == expected
    assert (
        registry.add_to_manifest(jobs) == registry.add_to_manifest(reversed(jobs)) == expected
    )  # delivered twice
    assert registry.add_to_manifest([]) == {}
    hashes = {e.card.name: e.content_hash() for e in experts[:-1]}
    assert registry.manifest() == Manifest(1, 0, BASE, hashes)


def test_looking_up_many_jobs_reads_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that there is no listing or manifest per job, and no read of a missing file."""
    registry = Registry(tmp_path, BASE)
    jobs = [make_expert(number).card.job for number in range(300)]
    for number in range(200):
        registry.publish(make_expert(number), add_to_manifest=False)
    calls: list[str] = []
    for method in ("names", "exists", "find", "read", "create"):
        original = getattr(Folder, method)

        def counted(*args: Any, _original: Any = original, _name: str = method) -> Any:
            calls.append(_name)
            return _original(*args)

        monkeypatch.setattr(Folder, method, counted)
    assert len(registry.recorded_all(jobs)) == 200
    assert (calls.count("names"), calls.count("exists"), calls.count("find")) == (2, 0, 200)
    calls.clear()
    assert len(registry.add_to_manifest(jobs)) == 200
    assert (calls.count("names"), calls.count("exists"), calls.count("find")) == (5, 0, 400)
    assert calls.count("create") == 1


def test_two_drivers_may_publish_different_experts_under_one_name(uri: str) -> None:
    """Check that each driver finds its own expert by its job, and the name refers to the last."""
    first, second = Registry(uri, BASE), Registry(uri, BASE)
    one, other = make_expert(1, name="task"), make_expert(2, name="task")
    first.publish(one, add_to_manifest=False)
    second.publish(other, add_to_manifest=False)
    first.add_to_manifest([one.card.job])
    second.add_to_manifest([other.card.job])
    assert first.find("task") == other.content_hash()
    assert first.recorded(one.card.job) == one.content_hash()
    assert first.load(one.content_hash()).card == one.card
    number = first.manifest().number
    # Within one call the last one counts too, however often it occurs.
    for _ in range(2):
        both = first.add_to_manifest([other.card.job, one.card.job])
        assert both == {other.card.job: other.content_hash(), one.card.job: one.content_hash()}
        assert first.find("task") == one.content_hash()
    assert first.manifest().number == number + 1
    assert verify(first.folder, every_manifest=True) == Check(2)


def test_two_drivers_with_different_bases_cannot_share_a_registry(uri: str) -> None:
    """Check that the second driver to publish in an empty registry fails and changes nothing."""
    first, second = Registry(uri, BASE), Registry(uri, OTHER_BASE)
    mine, theirs = make_expert(1), make_expert(2, base=OTHER_BASE)
    first.publish(mine, add_to_manifest=False)
    second.publish(theirs, add_to_manifest=False)
    first.add_to_manifest([mine.card.job])
    with pytest.raises(PhatgooseError, match=r"was made with base .* choose another folder"):
        second.add_to_manifest([theirs.card.job])
    with pytest.raises(PhatgooseError, match=r"was made with base .* choose another folder"):
        second.publish(make_expert(3, base=OTHER_BASE))
    assert Registry(uri, BASE).manifest() == Manifest(1, 0, BASE, {"task-1": mine.content_hash()})
    assert verify(first.folder).problems == []


def _register_same(barrier: Any, uri: str, jobs: list[str]) -> None:
    registry = Registry(uri, BASE)
    barrier.wait(120)
    assert len(registry.add_to_manifest(jobs)) == len(jobs)


@pytest.mark.slow
def test_jobs_registered_by_several_drivers_make_one_manifest(uri: str) -> None:
    """Check two drivers that find the same unregistered finished jobs, as after a crash."""
    registry = Registry(uri, BASE)
    experts = [make_expert(number) for number in range(12)]
    for expert in experts:
        registry.publish(expert, add_to_manifest=False)
    jobs = [expert.card.job for expert in experts]
    _together(_register_same, *[(uri, jobs)] * 3)
    [manifest] = _manifests(registry.folder)
    assert manifest.experts == {e.card.name: e.content_hash() for e in experts}
