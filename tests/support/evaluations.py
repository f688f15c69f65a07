"""Evaluations without Ray in one run folder, shared by the tests of the stage `evaluate`."""

from pathlib import Path
from typing import Any

from harness import run_folder
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.stage import Evaluation
from harness.registry.packs import Members
from harness.storage import Folder
from harness.tasks import TaskData, TaskSpec
from phatgoose.routers import Router, make_router
from tests.support.toy import LocalWorkers, setting

EXPERTS = ["e0", "e1", "e2"]


SWANS = TaskSpec("swans", ("swans",), split="all", limit=9)


SUMS = TaskSpec("sums", ("sums",), split="all", limit=5, max_new_tokens=4)


class NoWorkers(LocalWorkers):
    """Workers that fail if called: everything must be in the journal."""

    def add(self, method: str, calls: Any) -> range:
        assert not calls
        return range(0)


class Run:
    """Evaluations in one run folder."""

    def __init__(self, folder: Path, tasks: list[TaskData], members: Members) -> None:
        self.path, self.folder, self.tasks, self.members = folder, Folder(folder), tasks, members

    def evaluation(
        self,
        workers: LocalWorkers,
        characters: int = 150,
        dtype: str = "float32",
        **changes: Any,
    ) -> Evaluation:
        suite, tasks = changes.pop("suite", "held"), changes.pop("tasks", self.tasks)
        made = setting(self.path, workers, characters, dtype)
        requests = SuiteRequests.build(suite, tasks)
        return Evaluation(made, requests, **{"members": self.members, **changes})

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
