import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from phatgoose.files import TEMPORARY, replacing, safetensors_metadata


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with replacing(path) as temporary:
        assert TEMPORARY.fullmatch(temporary.name)
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_only_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("after")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        calls.append(path.exists())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    path = tmp_path / "file"
    with replacing(path) as temporary:
        temporary.write_bytes(b"all of it")
    assert calls == [False, True]  # first the content, then the folder with the name


def test_an_existing_file_is_kept_unless_replacing_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(FileExistsError), replacing(path, os.link) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_metadata_is_read() -> None:
    metadata = {"a": "é", "b": '{"c": 1}'}
    data = save({"x": torch.ones(2)}, metadata)
    assert safetensors_metadata(data) == metadata
    for damaged in (save({"x": torch.ones(2)}), data[:20], b"", data[1:]):
        with pytest.raises((LookupError, ValueError)):
            safetensors_metadata(damaged)
