"""Find adapters: composing a configuration downloads nothing, a hub id is fetched once."""

from pathlib import Path
from typing import Any

import pytest

from harness.config.load import load_config
from harness.tasks.adapters import adapter_folder
from phatgoose.errors import PhatgooseError


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """Count the downloads from the hub, which end in an empty folder."""
    found: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: Any) -> str:
        found.append((name, revision))
        if name == "owner/none":
            raise OSError("no such repository\nhttps://hub")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    adapter_folder.cache_clear()
    return found


def test_a_configuration_is_composed_without_a_download(
    downloads: list[tuple[str, str | None]], tmp_path: Path
) -> None:
    adapters = "pool.adapters=[owner/name,owner/other@v1,/adapters/spelling]"
    config = load_config(["pool=peft", adapters, "router=[merged]", f"run.dir={tmp_path}"])
    tasks = {spec.name: spec.adapter for spec in config.pool_tasks()}
    assert tasks == {
        "name": "owner/name",
        "other": "owner/other@v1",
        "spelling": "/adapters/spelling",
    }
    assert downloads == []


def test_a_hub_id_is_fetched_once(downloads: list[tuple[str, str | None]], tmp_path: Path) -> None:
    for _ in range(2):
        assert adapter_folder("owner/name") == str(tmp_path / "owner/name")
        assert adapter_folder("owner/name@v1") == str(tmp_path / "owner/name")
    assert downloads == [("owner/name", None), ("owner/name", "v1")]


def test_a_folder_is_used_as_it_is(
    downloads: list[tuple[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for where in ("owner/local", str(tmp_path), "/no/such/folder"):
        assert adapter_folder(where) == where
    assert downloads == []


def test_an_unavailable_adapter_is_refused_in_one_line(
    downloads: list[tuple[str, str | None]],
) -> None:
    with pytest.raises(PhatgooseError) as caught:
        adapter_folder("owner/none")
    assert str(caught.value).startswith("adapter owner/none is not a local folder, and the hub")
    assert "no such repository" in str(caught.value)
    assert "https" not in str(caught.value)
