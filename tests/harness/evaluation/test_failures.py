"""Check what failures cost: of shards, documents, tasks, routers, actors and storage."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from harness.evaluation import scoring
from harness.evaluation.actor import Asked
from harness.reporting.report import make_report
from harness.scheduling.actor import Refused
from harness.scheduling.workers import Failure, Killed
from harness.storage import Folder
from phatgoose.errors import OutOfMemory, PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.question import Question
from phatgoose.routers import make_router
from tests.support.evaluations import NoWorkers, Run, answer_files, evaluated, routers
from tests.support.toy import LocalWorkers


def failing(workers: LocalWorkers, calls: range, error: str) -> None:
    """Let the actor's calls with these numbers fail, as `Workers` reports it."""
    answer, number = workers.worker.answer, itertools.count()

    def fails(*arguments: Any) -> Any:
        failure = Failure(error, f"Traceback: {error}")
        return failure if next(number) in calls else answer(*arguments)

    workers.worker.answer = fails


def test_shards_that_a_killed_call_left_are_deleted(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base"))
    evaluation.ask(10**6)
    for key, result in workers.step(0):
        evaluation.take(key, result)
    shards = {name: run.folder.read(name) for name in answer_files(run)}
    evaluation.finish()
    for name, data in shards.items():
        run.folder.write(name, data)
    (run.path / "scores.parquet").unlink(missing_ok=True)
    later = run.evaluation(NoWorkers(None))
    later.add(routers("base"))
    assert answer_files(run) == ["answers/tasks/held/base.parquet"]
    later.finish()
    assert later.rows


def test_a_failed_router_keeps_no_scores_of_other_options(run: Run, workers: LocalWorkers) -> None:
    evaluated(run.evaluation(workers), "phatgoose", "base")
    failing(workers, range(10**6), "no room")
    evaluation = run.evaluation(workers)
    evaluation.add({"phatgoose": make_router("phatgoose", top_k=1)})
    evaluation.finish()
    evaluation.write_scores()
    assert {row["router"] for row in run.table("scores.parquet")} == {"base"}
    assert "base" in make_report(run.folder)


def test_a_failed_task_costs_other_routers_nothing(run: Run, workers: LocalWorkers) -> None:
    evaluated(run.evaluation(workers), "merged")
    failing(workers, range(1, 2), "no room")
    evaluated(run.evaluation(workers), "base")
    rows = run.table("scores.parquet")
    assert {(row["router"], row["task"]) for row in rows} == {
        ("merged", "swans"),
        ("merged", "sums"),
        ("base", "sums"),
    }


def test_a_task_that_cannot_be_scored_costs_only_itself(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scoring.score_task

    def fails(name: str, *rest: Any) -> Any:
        if name == "held/sums":
            raise ZeroDivisionError("no documents")
        return whole(name, *rest)

    monkeypatch.setattr(scoring, "score_task", fails)
    evaluation = evaluated(run.evaluation(workers), "base")
    assert {row["task"] for row in evaluation.rows} == {"swans"}
    (problem,) = evaluation.problems
    assert problem.startswith("router base on held/sums: it cannot be scored (no documents); see")
    monkeypatch.setattr(scoring, "score_task", whole)
    later = evaluated(run.evaluation(NoWorkers(None)), "base")
    assert {row["task"] for row in later.rows} == {"swans", "sums"}


def test_a_scorer_keeps_the_requests_of_few_documents(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_KEPT_DOCUMENTS", 9)
    evaluation = evaluated(run.evaluation(workers), "base", "phatgoose")
    scorers: Any = evaluation._scorers
    assert scorers.worker._built.keys() == scorers.worker._documents.keys() == {"held/sums"}
    assert {row["task"] for row in evaluation.rows} == {"swans", "sums"}


def test_a_task_without_a_primary_metric_ends_nothing(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: Any) -> float:
        raise PhatgooseError("a task has no metric from lm-eval")

    monkeypatch.setattr("harness.evaluation.stage.primary_mean", none)
    assert evaluated(run.evaluation(workers), "base").rows


def test_an_error_of_the_storage_is_no_damage(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(run.evaluation(workers), "base")
    run.folder.delete("scores.parquet")
    before = run.folder.read("answers/tasks/held/base.parquet")

    def times_out(*_: Any) -> None:
        raise PhatgooseError("the bucket does not answer")

    evaluation = run.evaluation(workers)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", times_out)
        with pytest.raises(PhatgooseError, match="does not answer"):
            evaluation.add(routers("base"))
    assert run.folder.read("answers/tasks/held/base.parquet") == before
    assert evaluated(run.evaluation(NoWorkers(None)), "base").rows


def test_errors_that_may_pass_are_tried_again(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base"))
    evaluation.ask(1)
    (key,) = workers._waiting
    _, arguments = workers._waiting[key]
    watch = evaluation._watch
    assert watch.revise(key, Refused("it has no gates")) is None
    again = [watch.revise(key, PhatgooseError("the disk is full")) for _ in range(2)]
    assert [given[:3] for given in again if given] == [arguments]
    assert again[1] is None
    evaluation.finish()


def test_answers_from_before_a_failure_are_kept(run: Run, workers: LocalWorkers) -> None:
    failing(workers, range(3, 10**6), "out of order")
    workers.most = 1
    evaluation = run.evaluation(workers)
    with pytest.raises(PhatgooseError, match=r"^router base: out of order; see logs/"):
        evaluation.run("base", make_router("base"))
    del workers.worker.answer
    again = LocalWorkers(workers.worker)
    assert run.evaluation(again).run("base", make_router("base"))
    assert again.calls == len(evaluation.shards) - 3


def test_what_waits_for_a_failed_router_is_cancelled(run: Run, workers: LocalWorkers) -> None:
    """Check an actor that refuses the first router, so that no other call can succeed."""
    answer: Callable[..., Any] = workers.worker.answer
    calls: list[str] = []

    def refuses(asked: Asked, *arguments: Any) -> Any:
        calls.append(asked.router.name())
        if asked.router.name() == "phatgoose":
            raise Refused("it has no gates")
        return answer(asked, *arguments)

    workers.worker.answer, workers.most = refuses, 1
    evaluation = run.evaluation(workers)
    evaluation.add(routers("phatgoose", "base"))
    evaluation.finish()
    assert calls == ["phatgoose"] + ["base"] * len(evaluation.shards)
    assert evaluation.routers["base"].state == "done"
    (problem,) = evaluation.problems
    assert problem == f"router phatgoose: it has no gates; see logs/ in {run.folder}"
    assert [row["state"] for row in evaluation.table()] == ["failed", "done"]


def test_a_router_whose_first_shards_all_fail_is_given_up(run: Run, workers: LocalWorkers) -> None:
    failing(workers, range(10**6), "illegal instruction")
    workers.most = 1
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base"))
    evaluation.finish()
    assert workers.calls == 3 < len(evaluation.shards)
    (row,) = evaluation.table()
    assert (row["state"], row["traceback"]) == ("failed", "Traceback: illegal instruction")


def test_a_failed_shard_costs_only_its_task(run: Run, workers: LocalWorkers) -> None:
    failing(workers, range(1, 2), "segmentation fault")
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base"))
    evaluation.finish()
    assert {row["task"] for row in evaluation.rows} == {"sums"}
    (problem,) = evaluation.problems
    assert problem.startswith("router base on held/swans: segmentation fault; see logs/")
    del workers.worker.answer
    again = LocalWorkers(workers.worker)
    later = run.evaluation(again)
    assert {row["task"] for row in later.run("base", make_router("base"))} == {"sums", "swans"}
    assert again.calls == 1


def test_a_bad_document_costs_only_its_task(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check one document that no actor can answer, until the next call of the run."""
    model = RoutedModel.score
    bad: list[str] = []

    def score(self: RoutedModel, questions: Sequence[Question]) -> Any:
        bad[1:] = []
        texts = [question.query.text for question in questions if question.query]
        bad.extend(texts[:1] if not bad else [])
        if bad[0] in texts:
            raise RuntimeError("a number is not finite")
        return model(self, questions)

    monkeypatch.setattr(RoutedModel, "score", score)
    evaluation = run.evaluation(workers, tokens=400)
    evaluation.add(routers("base"))
    evaluation.finish()
    assert {row["task"] for row in evaluation.rows} == {"sums"}
    (problem,) = evaluation.problems
    assert problem == (
        "router base on held/swans: 1 of 9 requests could not be answered (a number is not finite)"
        f", so there is no score; the other answers are kept; see logs/ in {run.folder}"
    )
    monkeypatch.setattr(RoutedModel, "score", model)
    again = LocalWorkers(workers.worker)
    rows = run.evaluation(again, tokens=400).run("base", make_router("base"))
    assert {(row["task"], row["n"]) for row in rows} == {("swans", 9), ("sums", 5)}
    assert again.calls == 1


@pytest.mark.parametrize("size", [1, 4])
def test_a_shard_that_was_killed_for_memory_is_asked_in_smaller_chunks(
    run: Run, workers: LocalWorkers, size: int
) -> None:
    evaluation = run.evaluation(workers, tokens=1 if size == 1 else 10**4)
    evaluation.add(routers("base"))
    evaluation.ask(1)
    (key,) = workers._waiting
    _, arguments = workers._waiting[key]
    watch = evaluation._watch
    halvings = []
    while revised := watch.revise(key, Killed("too much")):
        assert revised[:3] == arguments
        halvings.append(revised[3])
    assert halvings == ([] if size == 1 else [1, 2, 3, 4])  # a chunk of nine
    assert watch.revise(key, OutOfMemory("raised by the actor, which has halved it")) is None
    evaluation.finish()
