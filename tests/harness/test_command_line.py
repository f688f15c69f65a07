"""Check that errors of the operating system become one line that suggests a fix."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness.command_line import one_line_errors
from phatgoose.errors import PhatgooseError
from tests.support.small_disk import small_disk


def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def the_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


def prepare(files: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    overrides = ("pool=jsonl", f"pool.files={files}", "suite=held_in")
    return call("-m", "harness.tasks", "prepare", *overrides, PHATGOOSE_CACHE=str(cache))


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """Write a file of examples of a few megabytes."""
    path = tmp_path / "mine.jsonl"
    with path.open("w") as file:
        for i in range(400):
            words = os.urandom(4000).hex()
            file.write(json.dumps({"input": f"{i} {words}", "target": "yes"}) + "\n")
    return path


def test_a_full_disk_is_reported(examples: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "300k") as disk:
        line = the_line(prepare(examples, disk))
    assert "No space left on device" in line
    assert "free some space there" in line


def test_a_read_only_disk_is_reported(examples: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        line = the_line(prepare(examples, disk))
    assert "Read-only file system" in line
    assert "that you may write to" in line
    assert str(disk) in line


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_name_is_named() -> None:
    """Ray puts its sockets there."""
    with tempfile.TemporaryDirectory() as short:
        long = Path(short) / ("x" * 100)
        long.mkdir()
        script = "from harness.scheduling.cluster import Cluster\nwith Cluster() as c: c.connect()"
        done = call("-c", script, TMPDIR=str(long))
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert f"TMPDIR={long}: the name is too long for Ray's sockets" in last
        assert "Set RAY_TMPDIR to a short folder" in last


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_every_refusal_names_the_file_and_the_fix(number: int) -> None:
    with pytest.raises(PhatgooseError) as caught, one_line_errors():
        raise OSError(number, os.strerror(number), "/data/cache/x")
    line = str(caught.value)
    assert line.startswith(f"cannot use /data/cache/x ({os.strerror(number)}): ")
    assert "\n" not in line
    with pytest.raises(PhatgooseError, match="TMPDIR"), one_line_errors():
        raise OSError(number, os.strerror(number))


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ConnectionError), one_line_errors():
        raise ConnectionError(errno.ECONNREFUSED, "refused")
