"""Check the scoring actor in a process of its own, with a task of lm-eval that has functions."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from harness.evaluation.requests import SuiteRequests
from harness.evaluation.scoring import ScoringActor
from harness.run_folder import SAMPLES, read_table
from harness.scheduling.actor import code_version
from harness.storage import Folder
from harness.tasks import TaskData, prepare_all, task_specs
from phatgoose.base import Base
from phatgoose.routers import make_router
from tests.support.evaluations import LocalEvaluation
from tests.support.tiny import make_experts
from tests.support.toy import LocalWorkers, inputs_of, local_actor, members_of, setting

UTILS = """
def text(doc):
    return f"{doc['q']} A:"

def results(doc, results):
    likelihoods = [likelihood for likelihood, _ in results]
    return {"acc": float(likelihoods.index(max(likelihoods)) == doc["gold"]), "longest": 1.0}
"""


class Remote:
    """Calls an actor of Ray as if it were here."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def score(self, *arguments: Any) -> Any:
        return ray.get(self._actor.score.remote(*arguments))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TaskData]:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [{"q": f"Is the lake {i}?", "a": ["yes", "no"], "gold": i % 2} for i in range(6)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "utils.py").write_text(UTILS)
    definition = {
        "task": "own_functions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_choice": "a",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "longest", "aggregation": "mean"}],
    }
    functions = "doc_to_text: !function utils.text\nprocess_results: !function utils.results\n"
    (folder / "own.yaml").write_text(yaml.safe_dump(definition) + functions)
    group = {"name": "own", "source": "lm_eval", "lm_eval": ["own_functions"]}
    return prepare_all(task_specs({**group, "include_path": str(folder)}))


@pytest.mark.slow
def test_a_task_with_its_own_functions_is_scored(
    two_cores: None, tmp_path: Path, llama: Base, data: list[TaskData]
) -> None:
    experts = make_experts(llama, 2)
    workers = LocalWorkers(local_actor(llama, experts))

    def evaluation(run: Path) -> LocalEvaluation:
        inputs = inputs_of(SuiteRequests("own", data), llama, 40)
        return LocalEvaluation(setting(run, workers), inputs, members_of(experts))

    here = evaluation(tmp_path / "here" / "run")
    expected = here.run("phatgoose", make_router("phatgoose"))
    there = evaluation(tmp_path / "there" / "run")
    remote = ray.remote(num_cpus=0, max_concurrency=2)(ScoringActor)
    actor = remote.remote(str(tmp_path / "there" / "run"), code_version())
    scorers: Any = there._scorers
    scorers.worker = Remote(actor)
    found = there.run("phatgoose", make_router("phatgoose"))
    ray.kill(actor)
    assert [{**row, "seconds": 0} for row in found] == [{**row, "seconds": 0} for row in expected]
    assert {"acc", "longest"} <= {row["metric"] for row in found}
    samples = [
        read_table(Folder(tmp_path / where / "run"), "samples/own/phatgoose.parquet", SAMPLES)
        for where in ("here", "there")
    ]
    assert samples[0] == samples[1]
