"""Shared fixtures of the stage `evaluate`: a run of two tasks and three experts."""

from pathlib import Path

import pytest

from harness.tasks import TaskData
from phatgoose.base import Base
from tests.support.evaluations import EXPERTS, SUMS, SWANS, Run
from tests.support.tiny import make_experts
from tests.support.toy import LocalWorkers, local_actor, members_of, prepare_toys


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TaskData]:
    """Return one multiple-choice task and one generation task."""
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    return prepare_toys([SWANS, SUMS], tmp_path)


@pytest.fixture
def workers(llama: Base) -> LocalWorkers:
    return LocalWorkers(local_actor(llama, make_experts(llama, len(EXPERTS))))


@pytest.fixture
def run(tmp_path: Path, tasks: list[TaskData], llama: Base) -> Run:
    return Run(tmp_path / "run", tasks, members_of(make_experts(llama, len(EXPERTS))), llama)
