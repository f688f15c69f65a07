import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import RunConfig, RunSection
from harness.planning import plan as planning
from harness.planning.plan import Plan
from harness.registry import Registry
from harness.run import run
from harness.run_folder import RUN_FILE, write_run
from harness.storage import Folder
from phatgoose.base import load_base
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.training.recipe import Stage
from tests.support.tiny import make_experts, make_llama
from tests.support.toy import TASKS, generation_task, make_plan, prepare_toys, toy_config


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path) -> RunConfig:
    """Return a run of three experts and two held-out tasks, whose data are in the cache."""
    config: RunConfig = toy_config(llama_folder, tmp_path / "run")
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    return config


def refused(config: RunConfig) -> str:
    """Return the one-line error with which a plan is refused; check that nothing was written."""
    run_dir = Path(config.run.dir)
    before = files(run_dir)
    with pytest.raises(PhatgooseError) as caught:
        make_plan(config)
    assert files(run_dir) == before
    line = str(caught.value)
    assert "\n" not in line
    return line


def files(folder: Path) -> dict[Path, bytes]:
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def job_ids(plan: Plan) -> list[str]:
    return [job.card.job for job in plan.jobs]


def publish(plan: Plan, *names: str) -> None:
    """Do the jobs of these experts with untrained experts."""
    base = load_base(plan.config.base.name)
    registry = Registry(plan.config.registry, plan.base_fingerprint)
    [expert] = make_experts(base, 1)
    for job in plan.jobs:
        if job.card.name in names:
            registry.publish(Expert(job.card, expert.linears))


def test_a_plan_describes_the_work(config: RunConfig) -> None:
    plan = make_plan(config)
    assert [job.card.name for job in plan.jobs] == ["birds", "lakes", "numbers"]
    assert len(plan.open_jobs) == 3
    assert plan.finished == {}
    # Eight multiple-choice documents, and eight generated ones whose answers are scored as well.
    assert plan.work.requests == 8 + 8
    assert list(plan.routers)[:4] == ["base", "phatgoose", "merged", "random"]
    assert list(plan.routers)[4:] == ["single:birds", "single:lakes", "single:numbers"]
    text = plan.describe()
    for part in (
        "3 of 3 jobs (0 done before)",
        "7 routers, each on 16 requests",
        "swans, sums",
        "toys",
    ):
        assert part in text
    assert "min of one core's time" in text
    assert files(Path(config.run.dir)) == {}


def test_the_size_of_an_expert_is_the_size_of_its_file(config: RunConfig) -> None:
    plan = make_plan(config)
    base = load_base(config.base.name)
    [expert] = make_experts(base, 1, rank=config.train.rank)
    assert plan.expert_bytes == sum(
        4 * tensor.numel()
        for factors in expert.linears.values()
        for tensor in vars(factors).values()
    )


def test_job_ids_are_stable(config: RunConfig, tmp_path: Path) -> None:
    first = make_plan(config)
    # Settings that do not affect an expert: suite, routers, cluster, folders, the pool's name.
    other = dataclasses.replace(
        config,
        suites=[{**config.suites[0], "limit": 3}],
        router={"base": {}},
        pool={**config.pool, "name": "other"},
        run=RunSection(str(tmp_path / "elsewhere")),
        chunk_tokens=10,
    )
    assert job_ids(make_plan(other)) == job_ids(first)
    assert len(set(job_ids(first))) == 3


def test_job_ids_change_with_the_recipe(config: RunConfig) -> None:
    first = job_ids(make_plan(config))
    for changes in (
        {"seed": 1},
        {"lora": Stage(steps=5, lr=1e-2)},
        {"rank": 3},
        {"sort_window": 2},
    ):
        recipe = dataclasses.replace(config.train, **changes)
        other = job_ids(make_plan(dataclasses.replace(config, train=recipe)))
        assert set(other).isdisjoint(first)


def test_job_ids_do_not_change_with_gradient_checkpointing(config: RunConfig) -> None:
    first = make_plan(config)
    recipe = dataclasses.replace(config.train, gradient_checkpointing=True)
    plan = make_plan(dataclasses.replace(config, train=recipe))
    assert job_ids(plan) == job_ids(first)
    assert all(job.recipe.gradient_checkpointing for job in plan.jobs)
    assert all("gradient_checkpointing" not in job.card.recipe for job in plan.jobs)


def test_job_ids_change_with_the_data(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job_ids(make_plan(config))
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "other"))
    monkeypatch.setitem(TASKS, "birds", generation_task("bird", "swan"))
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    other = job_ids(make_plan(config))
    assert other[0] != first[0]
    assert other[1:] == first[1:]


def test_job_ids_change_with_the_base_and_not_with_its_folder(
    config: RunConfig, tmp_path: Path, llama_folder: Path
) -> None:
    first = job_ids(make_plan(config))

    def planned(folder: Path) -> list[str]:
        base = dataclasses.replace(config.base, name=str(folder))
        return job_ids(make_plan(dataclasses.replace(config, base=base)))

    shutil.copytree(llama_folder, tmp_path / "copy")
    assert planned(tmp_path / "copy") == first
    assert set(planned(make_llama(tmp_path / "other", seed=1))).isdisjoint(first)


def test_open_jobs_are_sorted_longest_first(config: RunConfig) -> None:
    # The prompts of `lakes` list the choices.
    assert make_plan(config).open_jobs[0].card.name == "lakes"


def test_finished_jobs_are_not_open(config: RunConfig) -> None:
    plan = make_plan(config)
    publish(plan, "birds", "numbers")
    after = make_plan(config)
    assert [job.card.name for job in after.open_jobs] == ["lakes"]
    assert "1 of 3 jobs (2 done before)" in after.describe()
    registry = Registry(config.registry, plan.base_fingerprint)
    path = registry.folder.local(f"objects/{registry.find('birds')}.arrow")
    assert path is not None
    path.unlink()
    assert {job.card.name for job in make_plan(config).open_jobs} == {"birds", "lakes"}


def test_the_same_run_may_be_resumed(config: RunConfig) -> None:
    plan = make_plan(config)
    write_run(plan.folder, {"identity": plan.identity})
    assert job_ids(make_plan(config)) == job_ids(plan)


def test_the_pool_of_a_run_may_grow(config: RunConfig) -> None:
    tasks = config.pool["tasks"]
    fewer = {name: tasks[name] for name in ("birds", "numbers")}
    plan = make_plan(dataclasses.replace(config, pool={**config.pool, "tasks": fewer}))
    write_run(plan.folder, {"identity": plan.identity})
    assert list(make_plan(config).identity["experts"]) == ["birds", "lakes", "numbers"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": "seed"}, "another training recipe or data for birds, lakes, numbers"),
        ({"pool": "fewer"}, "another pool"),
        ({"base": "other"}, "another base"),
    ],
    ids=["recipe", "pool", "base"],
)
def test_a_run_folder_of_another_run_is_refused(
    config: RunConfig, tmp_path: Path, changes: dict[str, str], expected: str
) -> None:
    plan = make_plan(config)
    write_run(plan.folder, {"identity": plan.identity})
    pool = {**config.pool, "tasks": {"birds": {"members": ["birds"]}}}
    other: Any = {
        "seed": dataclasses.replace(config.train, seed=1),
        "fewer": pool,
        "other": dataclasses.replace(config.base, name=str(make_llama(tmp_path / "b", seed=1))),
    }
    changed = {key: other[value] for key, value in changes.items()}
    line = refused(dataclasses.replace(config, **changed))
    assert f"holds a run with {expected}" in line
    assert config.run.dir in line


def test_a_registry_of_another_base_is_refused(config: RunConfig, tmp_path: Path) -> None:
    publish(make_plan(config), "birds")
    other = dataclasses.replace(config.base, name=str(make_llama(tmp_path / "other", seed=1)))
    line = refused(dataclasses.replace(config, base=other))
    assert config.registry in line
    assert "choose another" in line


@pytest.mark.parametrize("split", ["all", "evaluation"])
def test_trained_documents_are_not_evaluated_on(config: RunConfig, split: str) -> None:
    suite = {**config.suites[0], "split": split, "tasks": {"held": {"members": ["birds"]}}}
    line = refused(dataclasses.replace(config, suites=[suite]))
    assert "held: it has documents of birds that expert birds is trained on" in line


def test_trained_inputs_are_not_evaluated_on_under_another_name(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = generation_task("BIRD ", "swan")  # the inputs of `birds`, except for case and space
    monkeypatch.setitem(TASKS, "ducks", same)
    suite = {**config.suites[0], "tasks": {"ducks": {"members": ["ducks"]}}}
    changed = dataclasses.replace(config, suites=[suite])
    prepare_toys(changed.suite_tasks(suite), tmp_path)
    line = refused(changed)
    assert "suite task ducks" in line
    assert "expert birds is trained on" in line


def test_a_trained_task_may_be_evaluated_on_its_evaluation_split(config: RunConfig) -> None:
    tasks = {"birds": {"members": ["birds"]}}
    held = {**config.suites[0], "split": "evaluation", "tasks": tasks}
    assert make_plan(dataclasses.replace(config, suites=[held])).work.requests > 0
    assert "trained on" in refused(dataclasses.replace(config, suites=[{**held, "split": "all"}]))


def test_a_name_that_would_leave_the_folder_is_refused(config: RunConfig) -> None:
    pool = {**config.pool, "tasks": {"../birds": {"members": ["birds"]}}}
    assert "'../birds'" in refused(dataclasses.replace(config, pool=pool))


def test_a_run_folder_that_cannot_be_written_is_refused(config: RunConfig, tmp_path: Path) -> None:
    # Below a file, where not even root may write.
    (tmp_path / "file").write_text("")
    run = RunSection(str(tmp_path / "file" / "run"))
    assert run.dir in refused(dataclasses.replace(config, run=run))
    below = dataclasses.replace(config, registry=str(tmp_path / "file" / "registry"))
    assert below.registry in refused(below)


def test_a_full_disk_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    line = refused(config)
    assert "0.0 GiB free" in line
    assert config.registry in line
    assert not Path(config.run.dir).exists()


def test_a_missing_base_is_refused(config: RunConfig, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        base = dataclasses.replace(config.base, name=str(folder))
        assert str(folder) in refused(dataclasses.replace(config, base=base))


def test_damaged_data_are_refused(config: RunConfig) -> None:
    [task, *_] = make_plan(config).pool
    [shard] = task.train.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-50])
    shutil.rmtree(cache_dir() / "overlap")
    assert str(shard) in refused(config)


def test_a_damaged_record_of_the_run_is_refused(config: RunConfig) -> None:
    Folder(config.run.dir).write(RUN_FILE, b"{")
    assert RUN_FILE in refused(config)


def test_a_run_folder_with_unrelated_files_is_refused(config: RunConfig) -> None:
    Folder(config.run.dir).write(RUN_FILE, b"{}")
    assert "holds a run with another base" in refused(config)


def test_a_run_registers_experts_that_an_earlier_one_trained_but_did_not_register(
    config: RunConfig,
) -> None:
    """Check a driver that died between an expert's record and the manifest, with all trained."""
    plan = make_plan(config)
    registry = Registry(plan.config.registry, plan.base_fingerprint)
    [expert] = make_experts(load_base(plan.config.base.name), 1)
    for job in plan.all_jobs:
        registry.publish(Expert(job.card, expert.linears), add_to_manifest=False)
    assert registry.manifest().number == 0
    for _ in range(2):
        run(dataclasses.replace(config, stages=["train"]))
        manifest = registry.manifest()
        assert manifest.number == 1
        assert set(manifest.experts) == {job.card.name for job in plan.all_jobs}
