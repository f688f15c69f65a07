"""Check a job's checkpoint in the run folder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.storage import Folder
from harness.training.checkpoints import FolderCheckpoints, delete_checkpoints
from phatgoose.errors import PhatgooseError
from phatgoose.training.checkpoint import State
from tests.support.interrupted import RECIPE


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Return the file of a job's checkpoint."""
    FolderCheckpoints(Folder(tmp_path), "job", RECIPE).save(State("lora", step=3))
    return tmp_path / "checkpoints" / "job.safetensors"


def checkpoints(tmp_path: Path, job: str = "job", **changes: Any) -> FolderCheckpoints:
    return FolderCheckpoints(Folder(tmp_path), job, dataclasses.replace(RECIPE, **changes))


def test_a_checkpoint_is_found_until_it_is_deleted(kept: Path, tmp_path: Path) -> None:
    state = checkpoints(tmp_path).load()
    assert state == State("lora", step=3)
    assert checkpoints(tmp_path, micro_batch_size=1).load() == state
    FolderCheckpoints(Folder(tmp_path), "job").delete()
    FolderCheckpoints(Folder(tmp_path), "job").delete()
    assert not kept.exists()
    assert checkpoints(tmp_path).load() is None


def test_an_unusable_checkpoint_is_ignored_with_a_message(
    kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert checkpoints(tmp_path, seed=1).load() is None
    (tmp_path / "checkpoints" / "other.safetensors").write_bytes(kept.read_bytes())
    assert checkpoints(tmp_path, "other").load() is None
    kept.write_bytes(kept.read_bytes()[:-1])
    assert checkpoints(tmp_path).load() is None
    kept.write_bytes(b"\x00" * 100)
    assert checkpoints(tmp_path).load() is None
    lines = caplog.messages
    assert len(lines) == 4
    assert all("is not used, so the job starts from the beginning: it " in line for line in lines)


def test_a_full_disk_does_not_end_a_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PhatgooseError("no space")

    monkeypatch.setattr(Folder, "write", refuse)
    checkpoints(tmp_path).save(State("lora", step=3))
    assert caplog.messages == ["no checkpoint at step 3: no space"]


def test_a_checkpoint_is_due_after_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    own = FolderCheckpoints(Folder(tmp_path), "job", RECIPE, 60)
    other_rank = FolderCheckpoints(Folder(tmp_path), "job", RECIPE, 60, given=b"", writes=False)
    assert not own.due()
    now[0] += 60
    assert own.due()
    assert not other_rank.due()
    own.save(State("lora"))
    assert not own.due()
    other_rank.save(State("gates"))
    assert own.load() == State("lora")
    assert other_rank.load() is None


def test_checkpoints_of_finished_jobs_are_deleted(kept: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, "other").save(State("lora", step=1))
    delete_checkpoints(Folder(tmp_path), {"job", "another"})
    assert [path.name for path in kept.parent.iterdir()] == ["other.safetensors"]
    delete_checkpoints(Folder(tmp_path / "empty"), {"job"})
