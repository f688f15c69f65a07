"""Retry diverging and out-of-memory jobs with the real scheduler, actors and DeepSpeed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import run_folder
from harness.config.schema import RunConfig
from harness.driver.stages import Driver
from harness.registry import Registry
from harness.scheduling.cluster import Cluster
from harness.storage import Folder
from phatgoose.card import Card
from phatgoose.training.recipe import Recipe, Stage
from tests.support.failing import ShortOfMemory
from tests.support.toy import make_plan, prepare_toys, toy_config

pytestmark = [pytest.mark.slow(seconds=85), pytest.mark.usefixtures("two_cores")]


class Trained:
    """The outcome of a pool of one expert trained with this recipe."""

    def __init__(self, base: Path, folder: Path, **changes: Any) -> None:
        config: RunConfig = toy_config(base, folder / "run")
        config.pool = {"name": "toys", "tasks": {"birds": {"members": ["birds"]}}}
        config.router = {"base": {}, "merged": {}}
        config.train = replace(config.train, **changes)
        prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], folder)
        plan = make_plan(config)
        with Cluster() as cluster:
            driver = Driver(plan, cluster)
            driver.check()
            self.problems = driver.train()
        table = run_folder.read_table(Folder(config.run.dir), run_folder.JOBS_FILE, run_folder.JOBS)
        [self.row] = table.to_pylist()
        self.recipe: Recipe = config.train
        self.checkpoints = list((folder / "run" / "checkpoints").glob("*"))
        registry = Registry(config.registry, plan.base_fingerprint)
        content = registry.finished(plan.jobs[0].card.job)
        self.card: Card | None = registry.load(content).card if content else None


def test_a_job_that_runs_out_of_memory_retries_with_half_the_micro_batch(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.driver.stages.TrainActor", ShortOfMemory)
    trained = Trained(llama_folder, tmp_path)
    assert trained.problems == []
    [error] = trained.row["errors"]
    assert "memory ran out with micro-batches of 4 (CUDA out of memory." in error
    assert trained.row["micro_batch_size"] == 2
    assert trained.card is not None
    assert trained.card.recipe == {**trained.card.recipe, "micro_batch_size": 2, "batch_size": 4}
    assert trained.checkpoints == []


def test_a_diverging_job_retries_at_a_lower_learning_rate(
    tmp_path: Path, llama_folder: Path
) -> None:
    mad = Stage(steps=6, lr=1e30, warmup=0.0)
    trained = Trained(llama_folder, tmp_path, lora=mad, retry_lr=1e-32)
    assert trained.problems == []
    [error] = trained.row["errors"]
    assert "lower the recipe's lora.lr" in error
    assert trained.card is not None
    assert trained.card.recipe["lora"]["lr"] == pytest.approx(1e-2)
    assert trained.row["lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize(("retry_lr", "starts"), [(0.5, 2), (0.0, 1)])
def test_a_job_that_always_diverges_fails(
    tmp_path: Path, llama_folder: Path, retry_lr: float, starts: int
) -> None:
    mad = Stage(steps=6, lr=1e30, warmup=0.0)
    trained = Trained(llama_folder, tmp_path, lora=mad, retry_lr=retry_lr)
    [problem] = trained.problems
    assert problem.startswith("expert birds: the loss became nan at step")
    assert trained.card is None
    assert trained.row["state"] == "failed"
    assert trained.row["starts"] == starts
