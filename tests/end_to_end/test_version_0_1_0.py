"""Check that a registry and a run folder written by version 0.1.0 stay usable.

`tests/golden/version_0_1_0.tar.gz` is the toy run of `tests.support.toy` over
`tests.support.tiny.make_llama`, made by the code of version 0.1.0 in an empty folder, without its
plots and logs.
"""

import math
import tarfile
from pathlib import Path
from typing import Any

import pytest

from harness import run_folder
from harness.registry import Registry
from harness.registry.__main__ import main as registry_command
from harness.run import run
from harness.scheduling.settings import ClusterConfig
from harness.storage import Folder
from phatgoose import Pool, Question, RoutedModel, load_base, make_router
from tests.support.tiny import make_llama
from tests.support.toy import prepare_toys, toy_config

ARCHIVE = Path(__file__).parents[1] / "golden" / "version_0_1_0.tar.gz"
ROUTERS = ("base", "phatgoose", "merged", "arrow", "single", "oracle")
EXPERTS = {"birds", "lakes", "numbers"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Extract the folder in which 0.1.0 was called, and make it the current directory."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    make_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toy_run(folder: Path, *stages: str) -> Any:
    router: dict[str, Any] = {name: {} for name in ROUTERS} | {"phatgoose": {"top_k": 2}}
    changes: dict[str, Any] = {"router": router, "registry": str(folder / "run" / "registry")}
    changes |= {"stages": list(stages), "cluster": ClusterConfig(max_actors=1)}
    # The base is called as it was then. All else is absolute, wherever an actor may be.
    config = toy_config(Path("base"), folder / "run", **changes)
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], folder)
    return config


def values(run_dir: Path) -> dict[tuple[str, str, str], float]:
    rows = run_folder.read_table(
        Folder(run_dir), run_folder.SCORES_FILE, run_folder.SCORES
    ).to_pylist()
    return {(row["router"], row["task"], row["metric"]): row["value"] for row in rows}


def test_the_registry_is_complete_and_its_experts_route(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert registry_command(["verify", str(folder / "run" / "registry")]) == 0
    assert "3 experts" in capsys.readouterr().out
    base = load_base(str(folder / "base"))
    registry = Registry(folder / "run" / "registry", base.fingerprint)
    experts = [registry.load(content) for content in registry.manifest().experts.values()]
    assert {expert.card.name for expert in experts} == EXPERTS
    assert all(factors.gate_D is not None for e in experts for factors in e.linears.values())
    model = RoutedModel(base, Pool.from_experts(experts), make_router("phatgoose", top_k=2))
    question = Question.encode(base, "is the goose grey?", [" yes", " no"])
    assert all(math.isfinite(score.loglikelihood) for score in model.score([question])[0])


def test_the_run_folder_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run" / run_folder.SUMMARY_FILE).unlink()
    run(toy_run(folder, "report"))
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in ROUTERS if name != "single")
    assert (folder / "run" / run_folder.SUMMARY_FILE).exists()


@pytest.mark.slow(seconds=25)
@pytest.mark.usefixtures("own_ray")
def test_the_run_folder_is_resumed(folder: Path) -> None:
    """Check that nothing is trained, everything is asked again, and the scores are equal."""
    before, objects = values(folder / "run"), folder / "run" / "registry" / "objects"
    run(toy_run(folder, "train", "evaluate", "report"))
    again = values(folder / "run")
    assert before.keys() == again.keys()
    for key, value in before.items():
        assert math.isclose(value, again[key], abs_tol=1e-5), key
    assert len(list(objects.iterdir())) == len(EXPERTS)
    rows = run_folder.read_table(Folder(folder / "run"), run_folder.SCORES_FILE, run_folder.SCORES)
    assert None not in rows["code"].to_pylist()
