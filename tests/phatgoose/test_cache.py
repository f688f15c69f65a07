import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phatgoose import cache
from phatgoose.errors import PhatgooseError

CONTENT = b"a wheel"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL = "goose-1.0-py3-none-any.whl"
Pip = Callable[..., list[list[str]]]


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Replace pip; return the list of the commands that it receives from then on."""
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))

    def install(name: str = WHEEL, content: bytes = CONTENT, error: str = "") -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> SimpleNamespace:
            commands.append(command)
            if name:
                (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
            return SimpleNamespace(returncode=bool(error), stderr=error, stdout="")

        monkeypatch.setattr(cache.subprocess, "run", run)
        return commands

    return install


def fetch(*, source: bool = False) -> Path:
    return cache.fetch_distribution("goose==1.0", WHEEL, SHA256, source=source)


def test_a_file_is_fetched_once(pip: Pip) -> None:
    commands = pip()
    path = fetch()
    assert path.read_bytes() == CONTENT
    assert fetch() == path
    assert len(commands) == 1
    assert commands[0][-1] == "goose==1.0"
    assert "--no-deps" in commands[0]
    assert commands[0][commands[0].index("--only-binary") + 1] == "goose"


def test_packages_are_requested_as_sources(pip: Pip) -> None:
    commands = pip()
    fetch(source=True)
    assert commands[0][commands[0].index("--no-binary") + 1] == "goose"


def test_unexpected_content_is_refused_and_not_kept(pip: Pip) -> None:
    pip(content=b"another wheel")
    with pytest.raises(PhatgooseError, match=rf"{WHEEL} is damaged.*{SHA256[:12]}"):
        fetch()
    pip()
    assert fetch().read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_named(pip: Pip) -> None:
    pip()
    path = fetch()
    path.write_bytes(b"cut")
    with pytest.raises(PhatgooseError, match=rf"{path} is damaged \(3 bytes.*delete it"):
        fetch()


@pytest.mark.parametrize(
    ("name", "found"), [("goose-1.1.whl", r"goose-1\.1\.whl"), ("", "nothing")]
)
def test_a_different_file_is_refused(pip: Pip, name: str, found: str) -> None:
    pip(name=name)
    with pytest.raises(PhatgooseError, match=f"pip fetched {found} for goose==1.0, but {WHEEL}"):
        fetch()


@pytest.mark.parametrize(
    ("error", "reason"),
    [("warning\nERROR: no such version", "ERROR: no such version"), (" ", "no")],
)
def test_a_failed_download_quotes_the_reason_of_pip(pip: Pip, error: str, reason: str) -> None:
    pip(name="", error=error)
    with pytest.raises(PhatgooseError, match=f"could not download goose==1.0: {reason}") as raised:
        fetch()
    assert "\n" not in str(raised.value)


def test_the_cache_location_is_configurable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_CACHE", "~/goose")
    assert cache.cache_dir() == Path.home() / "goose"
    monkeypatch.delenv("PHATGOOSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_dir() == Path("/xdg/phatgoose")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == Path.home() / ".cache" / "phatgoose"
