"""Check who writes a registry's files: actors that see its folder, and nobody elsewhere."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.registry import Registry, client
from harness.registry.client import RegistryClient, opened_access
from harness.registry.files import Access, object_file, profile_file
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from tests.support.registries import BASE, make_expert

ID = "0123456789abcdef"


class LocalActor:
    """A registry actor in this process that counts the calls of its methods."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.calls = registry, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return getattr(self.registry, name)(*arguments)

        return SimpleNamespace(remote=call)


@pytest.fixture(params=["local", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "local":
        return Registry(tmp_path / "pool", BASE)
    return Registry(request.getfixturevalue("s3").uri(f"{tmp_path.name}/pool"), BASE)


@pytest.fixture
def actor(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalActor]:
    monkeypatch.setattr("harness.registry.client.ray.get", lambda value: value)
    yield LocalActor(registry)
    client._UNSEEN.clear()


def elsewhere(given: RegistryClient, uri: str) -> RegistryClient:
    """Return the client of a process for which another folder has the registry's path."""
    return RegistryClient(given.actor, Access(uri, BASE, given.access.token))


def test_a_process_that_sees_the_folder_writes_itself(
    registry: Registry, actor: LocalActor
) -> None:
    expert = make_expert(1)
    content = expert.content_hash()
    with opened_access(actor) as given:
        assert given.put_object(expert) == content
        assert given.put_profile(content, ID, b"a profile")
        assert given.load(content).card == expert.card
    assert registry.folder.names() == [object_file(content), profile_file(content, ID)]
    assert registry.folder.read(profile_file(content, ID)) == b"a profile"
    assert actor.calls == ["open_access", "close_access"]


def test_nothing_is_written_to_another_folder_of_the_same_path(
    registry: Registry, actor: LocalActor, tmp_path: Path
) -> None:
    expert = make_expert(1)
    content = registry.publish(expert)
    other = Registry(tmp_path / "disk" / "pool", BASE)  # of an earlier run on that machine
    other.publish(make_expert(2))
    before = other.folder.names()
    with opened_access(actor) as given:
        there = elsewhere(given, other.folder.uri)
        for _ in range(2):
            assert there.put_object(make_expert(3)) is None
            assert not there.put_profile(content, ID, b"a profile")
        assert there.load(content).card == expert.card
        empty = elsewhere(given, str(tmp_path / "nothing"))
        assert empty.put_object(expert) is None
        # It looked once: a server that does not answer would take a minute each time.
        assert actor.calls.count("renew_access") == 1
    assert other.folder.names() == before
    assert not (tmp_path / "nothing").exists()
    assert actor.calls.count("load") == 1


def test_access_outlives_gc_and_ends_with_its_block(registry: Registry, actor: LocalActor) -> None:
    with opened_access(actor) as given:
        (check,) = registry.folder.names()
        registry.folder.delete(check)  # as gc does after a day
        assert given.put_object(make_expert(1)) == make_expert(1).content_hash()
        assert check in registry.folder.names()
        with opened_access(actor) as second:
            assert second.access.token != given.access.token
        assert given.put_object(make_expert(2)) is not None
    assert [name for name in registry.folder.names() if name.startswith("check-")] == []


def test_a_folder_that_cannot_be_written_to_is_left_to_the_registry_actor(
    registry: Registry, actor: LocalActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Folder, name: str, data: bytes) -> None:
        raise PhatgooseError("read-only")

    with opened_access(actor) as given:
        with monkeypatch.context() as read_only:
            read_only.setattr(Folder, "write", refuse)
            assert given.put_object(make_expert(1)) is None
        assert given.put_object(make_expert(1)) == make_expert(1).content_hash()


def test_an_address_that_cannot_be_opened_is_left_to_the_registry_actor(
    registry: Registry, actor: LocalActor
) -> None:
    with opened_access(actor) as given:
        assert elsewhere(given, "s3://bucket/pool?nonsense=1").put_object(make_expert(1)) is None


def test_a_client_can_be_sent_to_another_process() -> None:
    access = Access("s3://bucket/pool", BASE, "0" * 32)
    assert pickle.loads(pickle.dumps(RegistryClient(None, access))).access == access


def test_an_error_of_the_block_is_not_hidden_by_one_of_its_end(
    registry: Registry, actor: LocalActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(registry: Registry, token: str) -> None:
        raise PhatgooseError("the server is gone")

    monkeypatch.setattr(Registry, "close_access", fails)
    with pytest.raises(ValueError, match="of the block"), opened_access(actor):
        raise ValueError("of the block")


@pytest.mark.parametrize("token", ["", "../" + "0" * 29, "G" * 32, "0" * 31])
def test_a_token_is_checked_before_it_becomes_a_name(tmp_path: Path, token: str) -> None:
    registry = Registry(tmp_path, BASE)
    for call in (registry.renew_access, registry.close_access):
        with pytest.raises(PhatgooseError, match="is not a token"):
            call(token)
