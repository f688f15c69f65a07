"""Check what a router may know about a question, and what an answer depends on."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import Multitask
from harness.evaluation.actor import Asked, Receipt
from harness.evaluation.encoding import EncodedShard
from harness.evaluation.requests import SuiteRequests
from harness.registry.packs import Members
from harness.tasks import TaskData, TaskSpec
from phatgoose.base import Base
from phatgoose.query import Query
from phatgoose.routers import Router, make_router
from tests.support.evaluations import LocalEvaluation
from tests.support.tiny import make_experts
from tests.support.toy import (
    LocalWorkers,
    inputs_of,
    local_actor,
    members_of,
    prepare_toys,
    setting,
)

SWANS = TaskSpec("swans", ("swans",), split="all", limit=4, description="about birds")
SUMS = TaskSpec("sums", ("sums",), split="all", limit=4, max_new_tokens=3)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TaskData]:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    return prepare_toys([SWANS, SUMS], tmp_path)


class Spy:
    """An actor that records what the router could see, and answers with another router."""

    def __init__(self, base: Base) -> None:
        experts = make_experts(base, 3)
        self.actor, self.members = local_actor(base, experts), members_of(experts)
        self.base = base
        self.seen: list[Query] = []
        self._files: Any = None
        self.actor._attach(self.members)
        model = self.actor._routed
        decided = model._decided

        def spy(queries: Any, contexts: Any) -> Any:
            self.seen += queries
            return decided(queries, contexts)

        model._decided = spy  # type: ignore[method-assign, assignment]

    def answer(self, asked: Asked, shard: EncodedShard, key: str) -> Receipt:
        self.actor._files = self._files
        return self.actor.answer(Asked(make_router("merged"), self.members), shard, key)


def evaluation(
    folder: Path,
    tasks: list[TaskData],
    spy: Spy,
    profiles: dict[str, str] | None = None,
    others: dict[str, str] | None = None,
) -> tuple[LocalEvaluation, LocalWorkers]:
    workers = LocalWorkers(spy)
    members = Members(spy.members.experts, profiles)
    inputs = inputs_of(SuiteRequests("held", tasks), spy.base, 40)
    return LocalEvaluation(setting(folder, workers), inputs, members, others), workers


def test_a_router_never_sees_the_right_answer(
    tmp_path: Path, llama: Base, tasks: list[TaskData]
) -> None:
    spy = Spy(llama)
    evaluation(tmp_path / "run", tasks, spy)[0].run("merged", make_router("merged"))
    sums = [query for query in spy.seen if query.text.startswith("\nQ: four")]
    swans = [query for query in spy.seen if query.text.startswith("\nQ: swan")]
    assert len(sums) == 4  # generated and, with its right answer, scored
    assert len(swans) == 4
    assert len(spy.seen) == len(sums) + len(swans)
    for query in sums:
        assert query.choices == ()
        assert "nine" not in query.text + query.task
        assert query.task == "sums"  # nothing else is known about it
    for query in swans:
        assert set(query.choices) == {"the swan", "the grey goose", "no"}
        assert query.task == "about birds"


def test_other_profiles_or_another_multitask_expert_are_asked_again(
    tmp_path: Path, llama: Base, tasks: list[TaskData]
) -> None:
    spy = Spy(llama)

    def calls(router: Router, made: tuple[LocalEvaluation, LocalWorkers]) -> int:
        made[0].run("mine", router)
        return made[1].calls

    def profiles(one: str, router: str = "average_activation") -> int:
        told = {name: f"{one}-{name}" for name in spy.members.experts}
        return calls(make_router(router), evaluation(tmp_path / "run", tasks, spy, told))

    def multitask(content: str) -> int:
        others = {"multitask": content}
        made = evaluation(tmp_path / "run", tasks, spy, others=others)
        return calls(Multitask("multitask"), made)

    first = profiles("p1")
    assert first > 0
    assert profiles("p1") == 0
    assert profiles("p2") == first
    assert profiles("p1", "merged") == first
    assert profiles("p2", "merged") == 0  # which does not read profiles
    assert multitask("m1") == first
    assert multitask("m1") == 0
    assert multitask("m2") == first


@pytest.mark.parametrize(("name", "again"), [("glider", True), ("phatgoose", False)])
def test_another_description_is_asked_again_where_it_is_read(
    name: str, again: bool, tmp_path: Path, llama: Base, tasks: list[TaskData]
) -> None:
    spy, router = Spy(llama), make_router(name)
    made, workers = evaluation(tmp_path / "run", tasks, spy)
    made.run(name, router)
    first = workers.calls
    other = [dataclasses.replace(tasks[0], description="about lakes"), tasks[1]]
    made, workers = evaluation(tmp_path / "run", other, spy)
    made.run(name, router)
    assert first > 0
    assert (0 < workers.calls < first) == again  # only the task with the other description
