"""Check that a fault around a run is reported in one line, and that the same command resumes.

Every run here ends with the scores of an undisturbed run.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import run_folder
from harness.config.schema import RunConfig
from harness.driver import stages
from harness.planning import plan
from harness.registry import __main__ as registry_cli
from harness.run import run
from harness.scheduling.settings import ClusterConfig
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from tests.support.small_disk import small_disk
from tests.support.toy import prepare_toys, toy_config

pytestmark = [
    pytest.mark.slow(seconds=140),
    pytest.mark.usefixtures("two_cores"),
]


@pytest.fixture(scope="module")
def whole(
    two_cores: None, tmp_path_factory: pytest.TempPathFactory, llama_folder: Path
) -> RunConfig:
    """Return an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    router: dict[str, Any] = {"phatgoose": {"top_k": 2}}
    cluster = ClusterConfig(max_actors=1)
    config: RunConfig = toy_config(llama_folder, folder / "run", router=router, cluster=cluster)
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], folder)
    run(config)
    return config


@pytest.fixture
def fresh(whole: RunConfig, tmp_path: Path) -> RunConfig:
    """Return the same run before its start."""
    return moved(whole, tmp_path / "run")


@pytest.fixture
def done(whole: RunConfig, fresh: RunConfig) -> RunConfig:
    """Return the finished run, copied to a separate folder."""
    shutil.copytree(whole.run.dir, fresh.run.dir)
    return fresh


def moved(config: RunConfig, folder: Path) -> RunConfig:
    where = dataclasses.replace(config.run, dir=str(folder))
    return dataclasses.replace(config, run=where, registry=str(folder / "registry"))


def fails(config: RunConfig) -> str:
    """Return the error message of a run that fails."""
    with pytest.raises(PhatgooseError) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scores(config: RunConfig) -> list[dict[str, Any]]:
    rows = run_folder.read_table(Folder(config.run.dir), run_folder.SCORES_FILE, run_folder.SCORES)
    return [{**row, "seconds": None} for row in rows.to_pylist()]


def check_whole(config: RunConfig, whole: RunConfig) -> None:
    """Check that the results equal those of the undisturbed run and the registry is intact."""
    assert scores(config) == scores(whole)
    assert registry_cli.main(["verify", config.registry]) == 0
    left = [path for path in Path(config.run.dir).rglob(".*") if path.suffix != ".lock"]
    assert left == []


def objects(config: RunConfig) -> list[Path]:
    return sorted((Path(config.registry) / "objects").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_expert_is_found_and_trained_again(
    done: RunConfig, whole: RunConfig, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    victim = objects(done)[0]
    data = bytearray(victim.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    shutil.rmtree(Path(done.registry) / "packs")
    shutil.rmtree(Path(done.run.dir) / "answers")
    (Path(done.run.dir) / "scores.parquet").unlink()  # so that it is evaluated again
    assert registry_cli.main(["verify", done.registry]) == 1
    assert str(victim) in "".join(capsys.readouterr())
    message = fails(done)
    assert str(victim) in message
    assert "delete it" in message
    victim.unlink()  # as the message suggests
    run(done)
    check_whole(done, whole)


def test_a_truncated_manifest_is_named(done: RunConfig, whole: RunConfig) -> None:
    manifests = Path(done.registry) / "manifests"
    newest = max(manifests.iterdir(), key=lambda path: int(path.stem))
    newest.write_bytes(newest.read_bytes()[:100])
    message = fails(done)
    assert str(newest) in message
    assert "delete it" in message
    newest.unlink()
    run(done)
    check_whole(done, whole)


def test_nodes_with_other_code_are_refused(
    fresh: RunConfig, whole: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "code_version", lambda: "0123456789ab")
        message = fails(fresh)
    assert message.startswith("experts lakes, numbers, birds: the code on node 127.0.0.1 is ")
    assert "the driver's is 0123456789ab. Install the same version" in message
    assert not (Path(fresh.registry) / "objects").exists()
    run(fresh)
    check_whole(fresh, whole)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "4m") as disk:
        yield disk


def test_a_full_disk_loses_no_work(
    whole: RunConfig, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = moved(whole, small / "run")
    assert "Free some" in fails(config)  # noticed before any work
    monkeypatch.setattr(plan, "_SPARE_BYTES", 0)
    ballast = small / "ballast"
    # Enough for the first expert and the small files of a run, but not for the rest.
    room = 3 * objects_size(whole) // 2 + 8 * 4096
    ballast.write_bytes(bytes(shutil.disk_usage(small).free - room))
    message = fails(config)
    assert "No space left on device" in message
    assert str(small) in message
    kept = objects(config)
    before = [path.stat().st_mtime_ns for path in kept]
    assert kept
    ballast.unlink()
    run(config)
    assert [path.stat().st_mtime_ns for path in kept] == before
    check_whole(config, whole)


def objects_size(config: RunConfig) -> int:
    return sum(path.stat().st_size for path in objects(config))


def test_clock_jumps_do_no_harm(
    fresh: RunConfig,
    whole: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, made = time.time, Path(fresh.registry) / "objects"
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * made.exists())
    run(fresh)
    assert "jumped by +86400 s" in capsys.readouterr().err
    check_whole(fresh, whole)
