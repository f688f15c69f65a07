"""Check that evaluation during training asks the same requests as the stage `evaluate`."""

from pathlib import Path
from typing import Any

import pytest

from harness.driver.early_evaluation import EarlyEvaluation
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.stage import Evaluation
from harness.registry.packs import Members
from harness.tasks import TaskData, TaskSpec
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.routers import make_router
from tests.support.evaluations import LocalEvaluation
from tests.support.tiny import make_experts
from tests.support.toy import LocalWorkers, inputs_of, local_actor, prepare_toys, setting

ROUTERS = {name: make_router(name) for name in ("base", "phatgoose", "single:e0", "single:e1")}


class Workers(LocalWorkers):
    """Evaluation actors that may be paused and closed."""

    paused = False
    closed = False

    @property
    def is_done(self) -> bool:
        return not self._waiting

    def close(self) -> None:
        self.closed = True


class Trainers:
    """Training actors, as far as early evaluation uses them."""

    wants_more = True


class Scene:
    """An early evaluation of two suites over a growing pool."""

    def __init__(self, folder: Path, base: Base, tasks: list[TaskData], shared: bool) -> None:
        made = make_experts(base, 2)
        self.all = {expert.card.name: expert.content_hash() for expert in made}
        self.workers, self.trainers = Workers(local_actor(base, made)), Trainers()
        self.experts: dict[str, str] = {}
        self.base = base
        self.folder, self.suites = folder, {"one": tasks[:1], "two": tasks[1:]}
        evaluations = self.evaluations(self.workers, self.experts)
        workers: Any = self.workers
        trainers: Any = self.trainers
        self.early = EarlyEvaluation(evaluations, self.experts, ROUTERS, trainers, workers, shared)

    def evaluations(self, workers: LocalWorkers, experts: dict[str, str]) -> list[LocalEvaluation]:
        made = setting(self.folder, workers)
        asked = [SuiteRequests(suite, tasks) for suite, tasks in self.suites.items()]
        inputs = [inputs_of(requests, self.base, 40) for requests in asked]
        return [LocalEvaluation(made, one, Members(experts)) for one in inputs]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TaskData]:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    choices = TaskSpec("swans", ("swans",), split="all", limit=6)
    answers = TaskSpec("sums", ("sums",), split="all", limit=4, max_new_tokens=4)
    return prepare_toys([choices, answers], tmp_path)


def test_early_answers_are_not_requested_again(
    tmp_path: Path, llama: Base, tasks: list[TaskData]
) -> None:
    scene = Scene(tmp_path / "run", llama, tasks, shared=False)
    scene.early.step()
    assert scene.workers.calls == 0  # there are no experts
    shards = sum(len(e.shards) for e in scene.evaluations(scene.workers, {}))
    scene.experts["e1"] = scene.all["e1"]
    scene.early.step()
    scene.early.finish()
    assert scene.workers.calls == 2 * shards  # base and single:e1
    scene.experts["e0"] = scene.all["e0"]
    scene.early.step()
    scene.early.finish()
    assert scene.workers.calls == 3 * shards

    later = Workers(scene.workers.worker)
    for evaluation in scene.evaluations(later, dict(sorted(scene.all.items()))):
        for name in ("base", "single:e0", "single:e1"):
            assert evaluation.run(name, ROUTERS[name])
        assert later.calls == 0
    # The pool's own router was not asked before all experts existed.
    evaluation.run("phatgoose", ROUTERS["phatgoose"])
    assert later.calls == len(evaluation.shards)


def test_training_has_priority_on_nodes_that_do_both(
    tmp_path: Path, llama: Base, tasks: list[TaskData]
) -> None:
    scene = Scene(tmp_path / "run", llama, tasks, shared=True)
    scene.experts |= scene.all
    scene.early.step()
    assert scene.workers.paused
    scene.trainers.wants_more = False
    scene.early.step()
    assert not scene.workers.paused
    scene.trainers.wants_more = True
    scene.early.step()
    assert scene.workers.paused
    scene.early.finish()
    assert not scene.workers.paused


def test_an_error_in_early_evaluation_does_not_stop_training(
    tmp_path: Path, llama: Base, tasks: list[TaskData], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path / "run", llama, tasks, shared=False)

    def refuses(*_: Any) -> None:
        raise PhatgooseError("the disk is full")

    monkeypatch.setattr(Evaluation, "take", refuses)
    scene.experts |= scene.all
    scene.early.step()
    scene.early.finish()
    assert scene.workers.closed
