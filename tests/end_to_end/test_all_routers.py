"""Run every router with trained, imported and multitask experts and profiles, in both families."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness import run_folder
from harness.config.load import load_config
from harness.config.schema import RunConfig
from harness.registry import Registry
from harness.run import run
from harness.scheduling.settings import ClusterConfig
from harness.storage import Folder
from phatgoose.base import load_base
from phatgoose.errors import PhatgooseError
from tests.support.adapters import save_adapter
from tests.support.toy import make_plan, prepare_toys, toy_config

pytestmark = [pytest.mark.slow(seconds=150), pytest.mark.usefixtures("two_cores")]

TRAINING_FREE = ["arrow", "spectr", "lag", "logo", "merged", "merged_factors", "ties", "dare"]
TRAINING_FREE += ["task_arithmetic", "uniform", "random", "random_experts", "base"]


def every_router() -> dict[str, Any]:
    """Return the routers of `router=[all]`, with the options that this pool needs."""
    router = load_config(["router=[all]", "run.dir=/data/run"]).router
    return {**router, "genknowsub": {"general": "birds"}, "multitask": {"steps": 3}}


def config_of(base: Path, tmp_path: Path, pool: dict[str, Any], router: Any) -> RunConfig:
    config: RunConfig = toy_config(
        base,
        tmp_path / "run",
        pool=pool,
        router=router,
        cluster=ClusterConfig(max_actors=1),
        chunk_tokens=500,
    )
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    return config


def scores_of(config: RunConfig) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = run_folder.read_table(Folder(config.run.dir), run_folder.SCORES_FILE, run_folder.SCORES)
    return {(row["router"], row["task"], row["metric"]): row for row in rows.to_pylist()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_router_works_in_one_run(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    base: Path = request.getfixturevalue(f"{family}_folder")
    save_adapter(load_base(str(base)), tmp_path / "adapter", r=2)
    adapted = {"members": ["numbers"], "adapter": str(tmp_path / "adapter")}
    tasks = {"birds": {"members": ["birds"]}, "lakes": {"members": ["lakes"]}, "numbers": adapted}
    router = every_router()
    config = config_of(base, tmp_path, {"name": "toys", "tasks": tasks}, router)
    run(config)
    said = capsys.readouterr()
    assert "4 of 4 jobs" in said.out  # including the multitask expert
    assert "trained   numbers: loss: gates" in said.err
    assert "+ glider also uses a description of the evaluation task" in said.out
    scores = scores_of(config)
    singles = {f"single:{expert}" for expert in tasks}
    assert {name for name, _, _ in scores} == {*router, *singles}
    nll = {name: scores[name, "swans", "nll"]["value"] for name in {*router, *singles}}
    assert nll["oracle"] == min(nll[name] for name in singles)
    assert nll["uniform"] == pytest.approx(nll["merged"], rel=1e-4)
    for name, task, metric in scores:
        chosen = scores[name, task, metric]["expert"]
        assert (chosen is not None) == (name in ("oracle", "best_individual"))
    [best] = {row["expert"] for key, row in scores.items() if key[0] == "best_individual"}
    assert nll["best_individual"] == nll[f"single:{best}"]
    assert len({round(value, 6) for value in nll.values()}) > 15  # they are not all equal

    profiles = Path(config.registry) / "profiles"
    before = contents(profiles)
    assert len(before) == 3
    next(profiles.iterdir()).unlink()
    answers = contents(tmp_path / "run" / "answers" / "tasks" / "held")
    assert len(answers) == len({name for name, _, _ in scores} - {"oracle", "best_individual"})
    run(config)  # measures that profile again, later than its training, and asks nothing
    assert contents(profiles).keys() == before.keys()
    assert contents(tmp_path / "run" / "answers" / "tasks" / "held") == answers
    assert scores_of(config) == scores


def test_a_pool_of_imported_adapters_is_evaluated(tmp_path: Path, llama_folder: Path) -> None:
    base = load_base(str(llama_folder))
    save_adapter(base, tmp_path / "one", r=3)
    save_adapter(base, tmp_path / "two", r=2, target_modules=["q_proj", "v_proj"])
    tasks = {name: {"adapter": str(tmp_path / name)} for name in ("one", "two")}
    router: dict[str, Any] = {name: {} for name in TRAINING_FREE}
    config = config_of(llama_folder, tmp_path, {"name": "imported", "tasks": tasks}, router)
    run(config)
    scores = scores_of(config)
    assert {name for name, _, _ in scores} == set(TRAINING_FREE)
    assert len({scores[name, "swans", "nll"]["value"] for name in TRAINING_FREE}) > 8

    # The same experts from the registry, where a manual import would put them too.
    named = {"name": "named", "source": "registry", "tasks": {"one": {}, "two": {}}}
    again = dataclasses.replace(config, pool=named, stages=["evaluate"])
    plan = make_plan(again)
    assert not plan.open_jobs
    assert [job.card.job for job in plan.jobs] == [job.card.job for job in make_plan(config).jobs]
    experts = Registry(config.registry, base.fingerprint).manifest().experts
    assert experts.keys() == {"one", "two"}
    for needing, need in (("phatgoose", "gates"), ("retrieval", "embeddings")):
        refused = dataclasses.replace(again, router={needing: {}})
        with pytest.raises(PhatgooseError, match=f"{needing}: it needs {need}, and one, two will"):
            make_plan(refused)
    lacking = dataclasses.replace(again, pool={**named, "tasks": {"one": {}, "three": {}}})
    with pytest.raises(PhatgooseError, match="has no experts three"):
        make_plan(lacking)
