import json
from pathlib import Path

import pytest
import torch

from harness.registry import Registry
from harness.registry.files import Manifest
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from tests.support.registries import BASE, OTHER_BASE, make_expert


@pytest.fixture(params=["local", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "pool" if request.param == "local" else "memory:///pool", BASE)


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "pool", BASE)


def test_an_empty_registry_writes_nothing(local: Registry) -> None:
    assert local.manifest() == Manifest(0, None, BASE, {})
    assert local.finished("0" * 16) is None
    assert local.folder.names() == []


def test_a_published_expert_can_be_loaded(registry: Registry) -> None:
    expert = make_expert(1)
    content_hash = registry.publish(expert)

    assert content_hash == expert.content_hash()
    loaded = registry.load(content_hash)
    assert loaded.card == expert.card
    assert loaded.content_hash() == content_hash
    assert registry.finished(expert.card.job) == content_hash
    assert registry.find("task-1") == content_hash
    assert registry.manifest() == Manifest(1, 0, BASE, {"task-1": content_hash})
    assert registry.folder.names() == [
        f"jobs/{expert.card.job}.json",
        "manifests/1.json",
        f"objects/{content_hash}.arrow",
    ]


def test_publishing_twice_changes_nothing(registry: Registry) -> None:
    registry.publish(make_expert(1))
    files = {name: registry.folder.read(name) for name in registry.folder.names()}
    registry.publish(make_expert(1))
    assert {name: registry.folder.read(name) for name in registry.folder.names()} == files


def test_the_first_expert_of_a_job_is_kept(registry: Registry) -> None:
    first = registry.publish(make_expert(1, value=1.0))
    assert registry.publish(make_expert(1, value=2.0)) == first
    assert registry.manifest() == Manifest(1, 0, BASE, {"task-1": first})


def test_a_name_follows_the_job_that_a_run_asks_for(registry: Registry) -> None:
    """Use recipe one, then two, then one again; each run finds its own expert by name."""
    first = registry.publish(make_expert(1, name="task"))
    second = registry.publish(make_expert(2, name="task"))
    assert registry.find("task") == second
    assert registry.finished(make_expert(1).card.job) == first
    assert registry.find("task") == first
    assert registry.manifest().number == 3


@pytest.mark.parametrize("crash_before", ["objects/", "jobs/", "manifests/"])
def test_an_interrupted_publish_is_resumed(
    local: Registry, monkeypatch: pytest.MonkeyPatch, crash_before: str
) -> None:
    write, create = Folder.write, Folder.create

    def dying(original: object):  # type: ignore[no-untyped-def]
        def call(self: Folder, name: str, data: bytes) -> bool | None:
            if name.startswith(crash_before):
                raise KeyboardInterrupt
            return original(self, name, data)  # type: ignore[operator]

        return call

    expert = make_expert(1)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", dying(write))
        patch.setattr(Folder, "create", dying(create))
        with pytest.raises(KeyboardInterrupt):
            local.publish(expert)

    again = Registry(local.folder.uri, BASE)
    if crash_before == "manifests/":  # the job is finished, so it will not be published again
        assert again.finished(expert.card.job) == expert.content_hash()
    else:
        assert again.finished(expert.card.job) is None
        again.publish(expert)
    assert again.manifest() == Manifest(1, 0, BASE, {"task-1": expert.content_hash()})


def test_left_over_temporary_files_are_ignored(local: Registry, tmp_path: Path) -> None:
    content_hash = local.publish(make_expert(1))
    for folder in ("objects", "jobs", "manifests"):
        (tmp_path / "pool" / folder / ".0123.tmp").write_bytes(b"half wri")
    (tmp_path / "pool/manifests/notes.txt").write_text("somebody's own file")
    assert local.manifest().experts == {"task-1": content_hash}
    local.publish(make_expert(2))
    assert local.manifest().number == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "replace"])
def test_damaged_objects_are_refused_and_can_be_fixed(local: Registry, damage: str) -> None:
    content_hash = local.publish(make_expert(1))
    path = local.folder.local(f"objects/{content_hash}.arrow")
    assert path is not None
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        at = data.index(torch.full((2, 4), 1.0).numpy().tobytes())
        data[at] ^= 1
    else:
        data = bytearray(make_expert(2).to_bytes())
    path.write_bytes(data)

    with pytest.raises(PhatgooseError, match=rf"{path} .*delete it") as raised:
        local.load(content_hash)
    assert "\n" not in str(raised.value)

    path.unlink()
    assert local.finished(make_expert(1).card.job) is None
    with pytest.raises(PhatgooseError, match=rf"{path} is missing: start the run again"):
        local.load(content_hash)
    assert local.publish(make_expert(1)) == content_hash
    assert local.load(content_hash).card.name == "task-1"
    assert local.manifest().number == 1


def test_retraining_a_job_replaces_its_lost_object(local: Registry) -> None:
    lost = local.publish(make_expert(1, value=1.0))
    local.folder.delete(f"objects/{lost}.arrow")
    again = local.publish(make_expert(1, value=2.0))
    assert again != lost
    assert local.finished(make_expert(1).card.job) == again
    assert local.find("task-1") == again


def test_another_base_is_refused(registry: Registry, local: Registry) -> None:
    with pytest.raises(PhatgooseError, match=f"base {OTHER_BASE[:12]}, but .* base {BASE[:12]}"):
        registry.publish(make_expert(1, base=OTHER_BASE))
    assert registry.folder.names() == []

    local.publish(make_expert(1))
    with pytest.raises(
        PhatgooseError, match=f"{BASE[:12]}.*{OTHER_BASE[:12]}.*registry="
    ) as raised:
        Registry(local.folder.uri, OTHER_BASE)
    assert BASE not in str(raised.value)


def test_all_missing_experts_are_listed(local: Registry) -> None:
    content_hash = local.publish(make_expert(1, name="winowhy"))
    assert local.experts(["winowhy"]) == {"winowhy": content_hash}
    with pytest.raises(PhatgooseError, match=r"no experts winowy, zebra: did you mean winowhy\?"):
        local.experts(["winowy", "winowhy", "zebra"])
    with pytest.raises(PhatgooseError, match=r"no experts zebra: .*registry list"):
        local.find("zebra")


@pytest.mark.parametrize(
    "content", ["", '{"schema": 1, "num', "[]", "1", '{"schema": 1}', '{"schema": "x"}',
                json.dumps({"schema": 1, "number": 3, "parent": 0, "base_fingerprint": BASE,
                            "experts": {}}),
                json.dumps({"schema": 1, "number": 2, "parent": 1, "base_fingerprint": BASE,
                            "experts": {"../a": "0" * 64}}),
                json.dumps({"schema": 1, "number": 2, "parent": 1, "base_fingerprint": BASE,
                            "experts": {"a": "../../etc"}})],
)  # fmt: skip
def test_a_malformed_manifest_is_named_and_never_skipped(local: Registry, content: str) -> None:
    content_hash = local.publish(make_expert(1))
    path = local.folder.local("manifests/2.json")
    assert path is not None
    path.write_text(content)
    with pytest.raises(PhatgooseError, match=rf"{path} is malformed.*delete it"):
        local.manifest()
    path.unlink()
    assert local.find("task-1") == content_hash


def test_a_newer_manifest_asks_for_an_update(local: Registry) -> None:
    local.folder.write("manifests/1.json", b'{"schema": 3, "anything": 0}')
    with pytest.raises(PhatgooseError, match=r"1\.json has the newer schema 3: update"):
        local.manifest()


def test_a_malformed_job_record_is_named(local: Registry) -> None:
    for content in (b"", b"{", b"[]", b'{"object": "../x", "name": "a"}'):
        local.folder.write("jobs/0123456789abcdef.json", content)
        with pytest.raises(PhatgooseError, match=r"jobs/0123456789abcdef\.json is malformed"):
            local.finished("0123456789abcdef")


@pytest.mark.parametrize("job", ["", "../../etc", "0123", "XYZ" * 5, "0" * 65, "0" * 16 + "\n"])
def test_ids_are_validated(local: Registry, job: str) -> None:
    with pytest.raises(PhatgooseError, match="is not a job id"):
        local.finished(job)
    with pytest.raises(PhatgooseError, match="is not a content hash"):
        local.load(job)


def test_open_finds_the_base_automatically(registry: Registry) -> None:
    with pytest.raises(PhatgooseError, match=r"no registry here: .*pool has no manifests"):
        Registry.open(registry.folder.uri)
    content_hash = registry.publish(make_expert(1))
    if registry.folder.local("x"):  # memory is a separate, empty registry each time
        opened = Registry.open(registry.folder.uri)
        assert (opened.base_fingerprint, opened.find("task-1")) == (BASE, content_hash)


def test_publish_can_refuse_to_take_over_a_name(registry: Registry) -> None:
    first = registry.publish(make_expert(1, name="task"), replace=False)
    assert registry.publish(make_expert(1, name="task"), replace=False) == first
    files = registry.folder.names()
    with pytest.raises(PhatgooseError, match=r"pool has another expert task: .*--replace"):
        registry.publish(make_expert(2, name="task"), replace=False)
    assert registry.folder.names() == files  # nothing is left of refused files
    assert registry.publish(make_expert(2, name="task")) == registry.find("task") != first
    with pytest.raises(PhatgooseError, match="another expert task"):
        registry.publish(make_expert(1, name="task"), replace=False)
