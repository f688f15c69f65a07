import os
import shutil
from pathlib import Path

import pytest

from harness.tasks.sources import hub
from harness.tasks.sources.hub import HubData
from phatgoose.errors import PhatgooseError
from tests.support.half_written import half_written
from tests.support.hub_copies import write_copy, write_parquet_branch, write_saved

ROWS = [{"question": f"q{i}", "label": i} for i in range(5)]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def test_a_copy_is_read_by_configuration_and_split(tmp_path: Path) -> None:
    write_copy(tmp_path, "owner/quiz", {"train": ROWS, "test": ROWS[:2]}, config="easy")
    write_copy(tmp_path, "owner/quiz", {"train": ROWS[:1]}, config="hard")
    easy = HubData("owner/quiz", config="easy")
    assert list(hub.rows(easy, "train", str(tmp_path))) == ROWS
    assert list(hub.rows(easy, "test", str(tmp_path))) == ROWS[:2]
    assert list(hub.rows(HubData("owner/quiz", config="hard"), "train", str(tmp_path))) == ROWS[:1]


def test_the_parquet_branch_and_saved_data_sets_are_read(tmp_path: Path) -> None:
    write_parquet_branch(tmp_path, "owner/old", "default", {"train": ROWS, "validation": ROWS[:1]})
    old = HubData("owner/old", data_dir="default", revision=hub.PARQUET)
    assert list(hub.rows(old, "validation", str(tmp_path))) == ROWS[:1]
    write_saved(tmp_path, "owner/flan", "A/Poem Writing", {"train": ROWS})
    saved = HubData("owner/flan", data_dir="A/Poem Writing")
    assert list(hub.rows(saved, "train", str(tmp_path))) == ROWS
    with pytest.raises(PhatgooseError, match=r"has no split test; it has \['train'\]"):
        hub.rows(saved, "test", str(tmp_path))


def test_missing_data_are_named_with_each_searched_location(tmp_path: Path) -> None:
    data = HubData("owner/quiz", config="easy")
    problem = hub.missing(data, str(tmp_path))
    assert problem is not None
    assert "owner/quiz easy" in problem
    assert str(tmp_path / "owner/quiz") in problem
    assert "hub-cache" in problem
    assert "HF_HUB_OFFLINE" in problem
    assert "folder=" in (hub.missing(data, None) or "")
    with pytest.raises(PhatgooseError, match="owner/quiz"):
        hub.rows(data, "train", str(tmp_path))


def test_a_wrong_configuration_split_or_folder_is_an_error(tmp_path: Path) -> None:
    write_copy(tmp_path, "owner/quiz", {"train": ROWS}, config="easy")
    write_copy(tmp_path, "owner/quiz", {"train": ROWS}, config="hard")
    for data, split, reason in (
        (HubData("owner/quiz", config="esy"), "train", "esy.*easy"),
        (HubData("owner/quiz", config="easy"), "dev", "dev"),
        (HubData("owner/quiz", data_dir="gone"), "train", "has no folder gone"),
    ):
        with pytest.raises(PhatgooseError, match=f"owner/quiz.*{reason}"):
            hub.rows(data, split, str(tmp_path))


def test_a_script_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "quiz"
    folder.mkdir(parents=True)
    ran = tmp_path / "ran"
    (folder / "quiz.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(PhatgooseError, match="owner/quiz"):
        hub.rows(HubData("owner/quiz"), "train", str(tmp_path))
    assert not ran.exists()


def test_identity_changes_with_the_copy(tmp_path: Path) -> None:
    write_copy(tmp_path, "owner/quiz", {"train": ROWS})
    data = HubData("owner/quiz")
    first = hub.identity(data, str(tmp_path))
    assert hub.identity(data, str(tmp_path)) == first
    (file,) = (tmp_path / "owner/quiz").rglob("*.parquet")
    os.utime(file, ns=(1, 1))
    assert hub.identity(data, str(tmp_path)) == first
    before = file.stat()
    changed = bytearray(file.read_bytes())
    changed[-9] ^= 1
    file.write_bytes(bytes(changed))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hub.identity(data, str(tmp_path)) != first


def test_a_changed_copy_is_read_again(tmp_path: Path) -> None:
    data = HubData("owner/quiz")
    write_copy(tmp_path, "owner/quiz", {"train": ROWS})
    assert len(hub.rows(data, "train", str(tmp_path))) == 5
    shutil.rmtree(tmp_path / "owner/quiz")
    write_copy(tmp_path, "owner/quiz", {"train": ROWS[:2]})
    assert list(hub.rows(data, "train", str(tmp_path))) == ROWS[:2]


def snapshot(cache: Path, path: str, commit: str) -> Path:
    """Write a download into the hub's cache: a snapshot and the branch that points to it."""
    repository = cache / f"datasets--{path.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_downloads_are_pinned_to_their_revision(tmp_path: Path, cache: Path) -> None:
    old, new = "a" * 40, "b" * 40
    folder = snapshot(tmp_path / "hub-cache", "owner/quiz", old)
    write_copy(folder, "", {"train": ROWS})
    data = HubData("owner/quiz")
    assert hub.missing(data, None) is None
    assert hub.identity(data, None)[-1] == old
    assert hub.origin(data, None)["revision"] == old
    assert list(hub.rows(data, "train", None)) == ROWS
    # The branch advances; the run stays at its revision.
    write_copy(snapshot(tmp_path / "hub-cache", "owner/quiz", new), "", {"train": ROWS[:1]})
    assert hub.identity(data, None)[-1] == old
    assert len(hub.rows(data, "train", None)) == 5
    (note,) = (cache / "hub").iterdir()
    assert old in note.read_text()


def test_a_pin_is_written_whole_or_not_at_all(tmp_path: Path, cache: Path) -> None:
    commit = "a" * 40
    write_copy(snapshot(tmp_path / "hub-cache", "owner/quiz", commit), "", {"train": ROWS})
    data = HubData("owner/quiz")
    with half_written(), pytest.raises(OSError, match="no space"):
        hub.identity(data, None)
    assert list((cache / "hub").iterdir()) == []
    assert hub.identity(data, None)[-1] == commit
