"""Evaluations without Ray in one run folder, shared by the tests of the stage `evaluate`."""

from pathlib import Path
from typing import Any

from harness import run_folder
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.stage import Evaluation
from harness.registry.packs import Members
from harness.scheduling.workers import Watch
from harness.storage import Folder
from harness.tasks import TaskData, TaskSpec
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router, make_router
from tests.support.toy import LocalWorkers, inputs_of, setting

EXPERTS = ["e0", "e1", "e2"]


SWANS = TaskSpec("swans", ("swans",), split="all", limit=9)


SUMS = TaskSpec("sums", ("sums",), split="all", limit=5, max_new_tokens=4)


class NoWorkers(LocalWorkers):
    """Workers that fail if called: everything must be answered already."""

    def add(self, method: str, calls: Any, watch: Watch | None = None) -> range:
        assert not calls
        return range(0)


class LocalEvaluation(Evaluation):
    """An evaluation whose actors are in this process."""

    def run(self, name: str, router: Router) -> list[dict[str, Any]]:
        """Evaluate one router; return its rows of scores, or raise why there are none."""
        self.add({name: router})
        self.finish()
        state = self.routers[name]
        if state.failed:
            raise PhatgooseError("; ".join(self.problems))
        return state.rows

    def finish(self) -> None:
        """Do all that was asked for."""
        while not self.is_done:
            self.step()

    def step(self) -> None:
        """Let the actors do one step."""
        self.ask(10**6)
        for key, result in self._evaluators.step(0):
            self.take(key, result)
        self.score()
        for key, result in self._scorers.step(0):
            self.take_score(key, result)

    @property
    def requests(self) -> int:
        """The number of requests with an answer."""
        return sum(state.requests for state in self.routers.values())


class Run:
    """Evaluations in one run folder."""

    def __init__(self, folder: Path, tasks: list[TaskData], members: Members, base: Base) -> None:
        self.path, self.folder, self.tasks, self.members = folder, Folder(folder), tasks, members
        self.base = base

    def evaluation(
        self, workers: LocalWorkers, tokens: int = 40, dtype: str = "float32", **changes: Any
    ) -> LocalEvaluation:
        suite, tasks = changes.pop("suite", "held"), changes.pop("tasks", self.tasks)
        made = setting(self.path, workers, dtype)
        inputs = inputs_of(SuiteRequests(suite, tasks), self.base, tokens)
        return LocalEvaluation(made, inputs, **{"members": self.members, **changes})

    def table(self, name: str) -> list[dict[str, Any]]:
        schema = {
            "scores": run_folder.SCORES,
            "samples": run_folder.SAMPLES,
            "routing": run_folder.ROUTING,
        }[name.partition("/")[0].partition(".")[0]]
        rows: list[dict[str, Any]] = run_folder.read_table(self.folder, name, schema).to_pylist()
        return rows


def routers(*names: str) -> dict[str, Router]:
    return {name: make_router(name) for name in names}


def answer_files(run: Run) -> list[str]:
    return [name for name in run.folder.names("answers/") if name.endswith(".parquet")]


def evaluated(evaluation: LocalEvaluation, *names: str) -> LocalEvaluation:
    evaluation.add(routers(*names))
    evaluation.finish()
    evaluation.write_scores()
    return evaluation
