"""Check which changes ask again: other code, experts, conditions, damage, failures."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from harness.evaluation.requests import SuiteRequests
from harness.evaluation.stage import Evaluation
from harness.planning.estimate import evaluation_work
from harness.registry.packs import Members, pool_id
from harness.reporting.report import make_report
from harness.tasks import TaskData
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router, make_router
from tests.support.evaluations import NoWorkers, Run, routers
from tests.support.toy import LocalWorkers, setting


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages that the harness has logged."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("harness.")]


def test_a_second_run_asks_nothing_and_gives_the_same_results(
    run: Run, workers: LocalWorkers, tasks: list[TaskData]
) -> None:
    wanted = routers("base", "phatgoose", "single:e0")

    def evaluate(workers: LocalWorkers) -> list[dict[str, Any]]:
        evaluation = run.evaluation(workers)
        rows = [row for name, router in wanted.items() for row in evaluation.run(name, router)]
        evaluation.write_scores(rows, derived={"oracle"})
        assert evaluation.requests == 3 * (9 + 5)  # found answers count too
        return run.table("scores.parquet")

    first = evaluate(workers)
    assert evaluation_work(tasks, 150).requests == 9 + 5
    assert len(run.folder.names("journal/")) == 3 * evaluation_work(tasks, 150).chunks
    files = {name: run.folder.read(name) for name in run.folder.names()}
    assert evaluate(NoWorkers(None)) == first  # including the seconds of the first run
    assert {name: run.folder.read(name) for name in run.folder.names()} == files


def test_early_answers_leave_nothing_to_ask(run: Run, workers: LocalWorkers) -> None:
    wanted = routers("base", "phatgoose", "merged")
    evaluation = run.evaluation(workers)
    evaluation.ask(wanted)
    assert evaluation.open_routers == {*wanted}
    while evaluation.is_waiting:
        evaluation.step(0)
    assert workers.calls == len(run.folder.names("journal/")) == 3 * len(evaluation.chunks)
    evaluation.ask(wanted)  # again, without anything to ask
    assert not evaluation.is_waiting
    later = run.evaluation(NoWorkers(None))  # for the next call of the run
    later.ask(wanted)
    assert later.requests == evaluation.requests == 3 * (9 + 5)
    evaluation._workers = NoWorkers(None)  # type: ignore[assignment]
    rows = [row for name in wanted for row in evaluation.run(name, wanted[name])]

    separate = Run(run.path.with_name("separate") / run.path.name, run.tasks, run.members)
    other = separate.evaluation(workers)
    expected = [row for name, router in wanted.items() for row in other.run(name, router)]
    assert [{**r, "seconds": 0} for r in rows] == [{**r, "seconds": 0} for r in expected]


def test_a_complete_router_does_not_wait_for_others(run: Run, workers: LocalWorkers) -> None:
    wanted, evaluation = routers("base", "phatgoose"), run.evaluation(workers)
    workers.most = 1
    evaluation.ask(wanted)
    assert evaluation.run("base", wanted["base"])
    assert evaluation.open_routers == {"phatgoose"}
    assert evaluation.run("phatgoose", wanted["phatgoose"])


@pytest.mark.parametrize(
    "changes",
    [
        {"members": 2},
        {"dtype": "bfloat16"},
        {"characters": 400},
    ],
    ids=["pool", "dtype", "chunks"],
)
def test_changed_conditions_are_asked_again(
    run: Run, workers: LocalWorkers, changes: dict[str, Any]
) -> None:
    if "members" in changes:
        fewer = list(run.members.experts.items())[: changes["members"]]
        changes = {"members": Members(dict(fewer))}
    run.evaluation(workers).run("merged", make_router("merged"))
    before = workers.calls
    run.evaluation(workers, **changes).run("merged", make_router("merged"))
    assert workers.calls > before


@pytest.mark.parametrize("name", ["base", "single:e1"])
def test_answers_that_do_not_depend_on_other_experts_stay_when_the_pool_grows(
    run: Run, workers: LocalWorkers, name: str
) -> None:
    small = Members({"e1": run.members.experts["e1"]})
    run.evaluation(workers, members=small).run(name, make_router(name))
    before = workers.calls
    run.evaluation(workers).run(name, make_router(name))
    assert workers.calls == before


def test_a_router_with_other_options_is_asked_again(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    one = evaluation.run("phatgoose", make_router("phatgoose", top_k=1))
    two = evaluation.run("phatgoose", make_router("phatgoose", top_k=2))
    assert [row["top_k"] for row in (one[0], two[0])] == [1, 2]
    assert [row["value"] for row in one] != [row["value"] for row in two]


def test_results_of_other_routers_and_suites_stay(
    run: Run, workers: LocalWorkers, tasks: list[TaskData]
) -> None:
    def evaluate(suite: str, chosen: list[TaskData], *names: str) -> None:
        evaluation = run.evaluation(workers, suite=suite, tasks=chosen)
        rows = [row for n, r in routers(*names).items() for row in evaluation.run(n, r)]
        evaluation.write_scores(rows)

    def held() -> set[tuple[str, str, str]]:
        rows = run.table("scores.parquet")
        assert len(rows) == len({(r["suite"], r["router"], r["task"], r["metric"]) for r in rows})
        return {(row["suite"], row["router"], row["task"]) for row in rows}

    evaluate("held", tasks, "base", "merged")
    evaluate("held", tasks, "phatgoose")
    assert {router for _, router, _ in held()} == {"base", "merged", "phatgoose"}
    evaluate("held", tasks, "base")
    assert {router for _, router, _ in held()} == {"base", "merged", "phatgoose"}
    evaluate("second", tasks[:1], "base", "phatgoose")
    evaluate("held", tasks[:1], "base")
    assert held() == {
        ("held", "base", "swans"),
        ("held", "merged", "swans"),  # and no sums, since base no longer has any
        ("held", "phatgoose", "swans"),
        ("second", "base", "swans"),
        ("second", "phatgoose", "swans"),
    }
    samples = run.table("samples/base.parquet")
    assert {(row["suite"], row["task"]) for row in samples} == {
        ("held", "swans"),
        ("second", "swans"),
    }
    assert "suite second" in make_report(run.folder)


def test_results_of_another_pool_are_dropped(run: Run, workers: LocalWorkers) -> None:
    two = Members(dict(list(run.members.experts.items())[:2]))
    for members, name in ((run.members, "merged"), (two, "base")):
        evaluation = run.evaluation(workers, members=members)
        evaluation.write_scores(evaluation.run(name, make_router(name)))
    rows = run.table("scores.parquet")
    assert {(row["manifest"], row["router"]) for row in rows} == {(pool_id(two.experts), "base")}


def test_answers_from_before_a_failure_are_kept(run: Run, workers: LocalWorkers) -> None:
    answer: Callable[..., Any] = workers.worker.answer
    left = 3

    def dies(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise PhatgooseError("out of order")
        return answer(*arguments)

    workers.worker.answer = dies
    evaluation = run.evaluation(workers)
    with pytest.raises(PhatgooseError, match=r"router base, task held/.*: out of order; see logs/"):
        evaluation.run("base", make_router("base"))
    assert evaluation.failures.keys() == {"base"}
    assert len(run.folder.names("journal/")) == 3
    workers.worker.answer, workers.calls = answer, 0
    run.evaluation(workers).run("base", make_router("base"))
    assert workers.calls == len(run.folder.names("journal/")) - 3


def changed_code(monkeypatch: pytest.MonkeyPatch, router: str) -> None:
    """Change the source code of one router."""
    from harness import source_code
    from harness.evaluation import actor as eval_actor
    from harness.evaluation import stage as evaluate

    def other(asked: Router) -> dict[str, str]:
        code = source_code.router_code(asked)
        return {**code, f"phatgoose.routers.{router}": "0" * 16} if asked.name() == router else code

    monkeypatch.setattr(evaluate, "router_code", other)
    monkeypatch.setattr(eval_actor, "router_code", other)


def test_an_edited_router_is_asked_again_with_a_message(
    run: Run,
    workers: LocalWorkers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = routers("base", "phatgoose", "merged")

    def evaluate() -> int:
        before, evaluation = workers.calls, run.evaluation(workers)
        evaluation.announce(wanted)
        for name, router in wanted.items():
            evaluation.run(name, router)
        return workers.calls - before

    chunks = evaluate() // 3
    assert messages(caplog) == []
    assert evaluate() == 0
    changed_code(monkeypatch, "phatgoose")
    assert evaluate() == chunks
    line = f"phatgoose.routers.phatgoose changed: {chunks} chunks of phatgoose are asked again"
    assert messages(caplog) == [line]
    assert evaluate() == 0
    assert messages(caplog) == [line]


@pytest.mark.parametrize(
    ("change", "value", "word"),
    [
        ("base", "another fingerprint", "base"),
        ("dtype", "bfloat16", "dtype"),
        ("device", "cuda", "device"),
        ("versions", '{"torch": "1.0"}', "versions"),
        ("code", "0" * 16, ""),
    ],
)
def test_answers_under_other_conditions_are_asked_again(
    run: Run,
    workers: LocalWorkers,
    caplog: pytest.LogCaptureFixture,
    change: str,
    value: str,
    word: str,
) -> None:
    wanted = routers("base", "merged")
    made = setting(run.path, workers, 150)
    requests = SuiteRequests.build("held", run.tasks)
    counts = []
    other = dataclasses.replace(made.conditions, **{change: value})
    for conditions in (made.conditions, other):
        before = workers.calls
        evaluation = Evaluation(
            dataclasses.replace(made, conditions=conditions), requests, run.members
        )
        evaluation.announce(wanted)
        rows = [row for name, router in wanted.items() for row in evaluation.run(name, router)]
        counts.append(workers.calls - before)
        if change in ("dtype", "device"):
            assert {row[change] for row in rows} == {getattr(conditions, change)}
    assert counts[0] == counts[1] > 0
    line = f"{word} changed: {counts[1]} chunks of base, merged are asked again"
    # Modules are named if code changed; here only its hash was different.
    assert messages(caplog) == ([line] if word else [])


@pytest.mark.parametrize("damage", ["cut", "number", "empty"])
def test_a_damaged_answer_is_asked_again_with_a_message(
    run: Run, workers: LocalWorkers, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    def evaluate() -> list[dict[str, Any]]:
        evaluation = run.evaluation(workers)
        rows = evaluation.run("phatgoose", make_router("phatgoose"))
        return [{**row, "seconds": 0} for row in rows]

    first, before = evaluate(), workers.calls
    file = sorted((run.path / "journal").iterdir())[1]
    data = file.read_bytes()
    if damage == "number":
        start = data.index(b"loglikelihood")
        digits = next(i for i in range(start, len(data)) if data[i : i + 1].isdigit())
        changed = bytes([ord("1") + (data[digits] == ord("1"))])
        file.write_bytes(data[:digits] + changed + data[digits + 1 :])
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert evaluate() == first
    assert workers.calls == before + 1
    [error] = messages(caplog)
    assert file.name in error
    assert "is damaged; it is asked again" in error
    assert evaluate() == first
    assert workers.calls == before + 1


def test_a_lost_answer_is_asked_again(
    run: Run, workers: LocalWorkers, caplog: pytest.LogCaptureFixture
) -> None:
    """Check an answer that existed when the evaluation began."""
    run.evaluation(workers).run("merged", make_router("merged"))
    before, evaluation = workers.calls, run.evaluation(workers)
    file = sorted((run.path / "journal").iterdir())[0]
    file.unlink()
    evaluation.run("merged", make_router("merged"))
    assert workers.calls == before + 1
    assert f"{file.name} is missing; it is asked again" in messages(caplog)[0]


def test_an_actor_with_different_router_code_refuses(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a mismatch as with a plugin whose files differ between nodes."""
    from harness import source_code
    from harness.evaluation import actor as eval_actor

    changed_code(monkeypatch, "merged")
    monkeypatch.setattr(eval_actor, "router_code", source_code.router_code)
    with pytest.raises(PhatgooseError, match="router=merged: its code on this node differs"):
        run.evaluation(workers).run("merged", make_router("merged"))
    assert run.evaluation(workers).run("base", make_router("base"))
