"""Check that `verify` finds any changed bit in a registry's files, unless it is harmless."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.registry import Registry
from harness.registry.__main__ import main
from harness.registry.files import manifest_numbers, read_manifest
from harness.registry.packs import open_pool, pool_id
from harness.registry.verify import verify
from harness.storage import Folder
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.profile import Profile
from tests.support.pools import make_profiles
from tests.support.registries import BASE, make_expert
from tests.support.tiny import make_experts

ID = "0123456789abcdef"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """Make a registry with every kind of file."""
    from phatgoose.base import load_base

    folder = tmp_path_factory.mktemp("damage") / "pool"
    registry = Registry(folder, BASE)
    for number in (1, 2):
        registry.publish(make_expert(number))
    registry.remove("task-1")
    registry.publish(make_expert(3))
    registry.publish(make_expert(4), add_to_manifest=False)
    [profile] = make_profiles(make_experts(load_base(str(llama_folder)), 1))
    registry.put_profile(registry.find("task-3"), ID, profile.to_bytes())
    open_pool(registry, registry.manifest().experts, registry.load)
    (folder / "packs").joinpath(f".{pool_id(registry.manifest().experts)}.lock").unlink()
    assert verify(registry.folder, every_manifest=True).problems == []
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def content(folder: Path, file: str) -> object:
    """Return the decoded content of a file."""
    path = folder / file
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    if path.suffix == ".arrow":
        return Expert.load(path).content_hash()
    if file.startswith("profiles/"):
        return Profile.load(path).to_bytes()
    return path.read_bytes()


def load(folder: Path, content_hash: str) -> Expert | None:
    """Return what a run loads; None if it is refused by a line that names the file."""
    with contextlib.suppress(PhatgooseError):
        return Registry(folder, BASE).load(content_hash)
    with pytest.raises(PhatgooseError, match=rf"{folder}/objects/{content_hash}\.arrow"):
        Registry(folder, BASE).load(content_hash)
    return None


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_flipped_bit_or_truncation_is_found_or_harmless(whole: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(files(whole)))
    path, before = whole / file, content(whole, file)
    originals = {name: (whole / name).read_bytes() for name in files(whole)}
    original = originals[file]
    at = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    if data.draw(st.booleans()):
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        changed = changed[:at]
    try:
        # A new file in its place, because the original may be mapped.
        path.unlink()
        path.write_bytes(changed)
        check = verify(Folder(whole), every_manifest=True)
        assert all("\n" not in problem for problem in check.problems)
        if not check.problems:
            assert content(whole, file) == before
        if path.suffix == ".arrow" and (expert := load(whole, path.stem)):
            assert expert.content_hash() == path.stem
            assert content(whole, file) == before
        if file.startswith("packs/"):
            registry = Registry(whole, BASE)
            pool = open_pool(registry, registry.manifest().experts, registry.load)
            assert pool.experts == ("task-2", "task-3")
            assert torch.equal(pool.linears["layers.0.q"].lora_A_ERD, torch.full((2, 2, 4), 1.0))
    finally:
        for name in files(whole):
            (whole / name).unlink()
        for name, bytes_ in originals.items():
            (whole / name).write_bytes(bytes_)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "pool"))


def test_every_missing_file_is_found_or_harmless(copy: Path) -> None:
    """Check that deleting a manifest, profile or record equals never having written it."""
    newest = read_manifest(Folder(copy), manifest_numbers(Folder(copy))[-1])
    for file in files(copy):
        path = copy / file
        original = path.read_bytes()
        path.unlink()
        problems = verify(Folder(copy), every_manifest=True).problems
        assert bool(problems) == file.startswith(("objects/", "packs/")), file
        path.write_bytes(original)
    assert set(newest.experts) == {"task-2", "task-3"}


def test_a_truncated_newest_manifest_is_reported_and_repaired(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the problem names the newest intact manifest, and the suggested fix works."""
    newest = max((copy / "manifests").iterdir(), key=lambda path: int(path.stem))
    newest.write_bytes(newest.read_bytes()[:-20])
    assert main(["verify", str(copy)]) == 1
    [problem, *_] = capsys.readouterr().out.splitlines()
    assert problem.startswith(f"{newest} is malformed (")
    assert ": delete it, and finished jobs are added again by the next run; manifest 3 " in problem
    assert problem.endswith("manifest 3 (1 experts) is the newest good one")
    for command in (["list"], ["gc"]):
        assert main([*command, str(copy)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {newest} is malformed (")
    with pytest.raises(PhatgooseError, match=r"is malformed .* delete it"):
        Registry(copy, BASE)

    newest.unlink()
    registry = Registry(copy, BASE)
    assert set(registry.manifest().experts) == {"task-2"}
    jobs = [make_expert(number).card.job for number in (1, 2, 3, 4)]
    registry.add_to_manifest(jobs)  # the next run
    assert set(registry.manifest().experts) == {"task-2", "task-3", "task-4"}
    assert verify(Folder(copy)).problems == []


def test_a_malformed_only_manifest_is_reported(tmp_path: Path) -> None:
    registry = Registry(tmp_path, BASE)
    registry.publish(make_expert(1))
    registry.folder.write("manifests/1.json", b"")
    [problem] = verify(registry.folder).problems
    assert problem.endswith("; there is no other")


def test_files_under_a_wrong_name_are_found(copy: Path) -> None:
    """Check intact files whose content belongs to another name."""
    folder = Folder(copy)
    registry = Registry(copy, BASE)
    first, second = (make_expert(number) for number in (2, 3))
    job = f"jobs/{first.card.job}.json"
    folder.write(job, folder.read(f"jobs/{second.card.job}.json"))
    [problem] = verify(folder).problems
    assert problem.startswith(f"{folder}/{job} names objects/{second.content_hash()}.arrow, which")
    wrong = {"task-2": second.content_hash()}
    registry._follow(registry.manifest(), wrong)
    assert "calls objects/" in verify(folder).problems[0]


def test_files_of_earlier_versions_are_read(tmp_path: Path, llama: Base) -> None:
    registry = Registry(tmp_path, BASE)
    content_hash = registry.publish(make_expert(1))
    job = f"jobs/{make_expert(1).card.job}.json"
    for file, changes in (("manifests/1.json", {"schema": 1}), (job, {})):
        old = json.loads(registry.folder.read(file))
        del old["sha256"]
        registry.folder.write(file, json.dumps({**old, **changes}).encode())
    assert registry.find("task-1") == content_hash
    assert registry.finished(make_expert(1).card.job) == content_hash
    assert verify(registry.folder).problems == []
    # A file of this version requires its checksum.
    old = json.loads(registry.folder.read("manifests/1.json"))
    registry.folder.write("manifests/1.json", json.dumps({**old, "schema": 2}).encode())
    with pytest.raises(PhatgooseError, match="it has no checksum"):
        registry.manifest()
