"""Check which changes ask again: other code, experts, conditions, damage, failures."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from harness.evaluation.documents import Documents
from harness.evaluation.requests import SuiteRequests
from harness.planning.estimate import evaluation_work
from harness.registry.packs import Members, pool_id
from harness.reporting.report import make_report
from harness.tasks import TaskData
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router, make_router
from tests.support.evaluations import (
    SUMS,
    SWANS,
    LocalEvaluation,
    NoWorkers,
    Run,
    answer_files,
    evaluated,
    routers,
)
from tests.support.toy import LocalWorkers, inputs_of, prepare_toys, setting


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of the harness."""
    found = [r for r in caplog.records if r.name.startswith("harness.")]
    return [record.getMessage() for record in found if record.levelno >= logging.WARNING]


def test_a_second_run_asks_nothing_and_gives_the_same_results(
    run: Run, workers: LocalWorkers, tasks: list[TaskData]
) -> None:
    wanted = routers("base", "phatgoose", "single:e0")

    def evaluate(workers: LocalWorkers) -> list[dict[str, Any]]:
        evaluation = run.evaluation(workers)
        evaluation.add(wanted)
        evaluation.finish()
        evaluation.write_scores(derived={"oracle"})
        assert evaluation.requests == 3 * (9 + 5)  # found answers count too
        return run.table("scores.parquet")

    first = evaluate(workers)
    assert evaluation_work(tasks).requests == 9 + 5
    assert answer_files(run) == [
        f"answers/tasks/held/{name}.parquet" for name in ("base", "phatgoose", "single@e0")
    ]
    files = {name: run.folder.read(name) for name in run.folder.names()}
    assert evaluate(NoWorkers(None)) == first  # including the seconds of the first run
    assert {name: run.folder.read(name) for name in run.folder.names()} == files


@pytest.mark.parametrize(
    "lost",
    [
        "scores.parquet",
        "samples/held/phatgoose.parquet",
        "routing/held/phatgoose.parquet",
        "answers/scored/held/phatgoose.json",
    ],
)
def test_lost_results_come_from_the_answers(run: Run, workers: LocalWorkers, lost: str) -> None:
    def evaluate(workers: LocalWorkers) -> None:
        evaluation = run.evaluation(workers)
        evaluation.add(routers("base", "phatgoose"))
        evaluation.finish()
        evaluation.write_scores()

    evaluate(workers)
    files = {name: run.folder.read(name) for name in run.folder.names()}
    run.folder.delete(lost)
    evaluate(NoWorkers(None))
    assert {name: run.folder.read(name) for name in run.folder.names()} == files


def test_other_metrics_are_computed_from_the_same_answers(
    run: Run, workers: LocalWorkers, tasks: list[TaskData], tmp_path: Path
) -> None:
    first = evaluated(run.evaluation(workers), "base", "phatgoose").rows
    (tmp_path / "2").mkdir()
    changed = prepare_toys([SWANS, dataclasses.replace(SUMS, metric="rouge_l")], tmp_path / "2")
    rows = evaluated(run.evaluation(NoWorkers(None), tasks=changed), "base").rows
    assert "rouge_l" not in {row["metric"] for row in first}
    assert "rouge_l" in {row["metric"] for row in rows}


def test_other_correct_answers_are_scored_again(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluated(run.evaluation(workers), "base").rows
    of = Documents.of

    def turned(data: TaskData) -> Documents:
        documents = of(data)
        rows = [
            {**row, "correct": [(row["correct"][0] + 1) % 3]} if row["choices"] else row
            for row in documents.rows
        ]
        return dataclasses.replace(documents, rows=rows)

    monkeypatch.setattr(Documents, "of", turned)
    rows = evaluated(run.evaluation(NoWorkers(None)), "base").rows

    def value(rows: list[dict[str, Any]], metric: str) -> Any:
        return next(r for r in rows if (r["task"], r["metric"]) == ("swans", metric))["value"]

    assert value(rows, "nll") != value(before, "nll")


def test_other_code_of_metrics_scores_again(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored() -> int:
        evaluation = evaluated(run.evaluation(workers), "base")
        scorers: Any = evaluation._scorers
        calls: int = scorers.calls
        return calls

    assert [scored(), scored()] == [1, 0]
    monkeypatch.setattr("harness.evaluation.stage.code_of", lambda _: {"metrics": "changed"})
    assert [scored(), scored()] == [1, 0]


def test_early_answers_leave_nothing_to_ask(run: Run, workers: LocalWorkers) -> None:
    wanted = routers("base", "phatgoose", "merged")
    evaluation = run.evaluation(workers)
    evaluation.add(wanted)
    while any(state.to_ask or state.open for state in evaluation.routers.values()):
        evaluation.ask(10**6)
        for key, result in workers.step(0):
            evaluation.take(key, result)
    assert workers.calls == len(answer_files(run)) == 3 * len(evaluation.shards)
    evaluation.add(wanted)  # again, without anything to ask
    later = run.evaluation(NoWorkers(None))  # for the next call of the run
    later.add(wanted)
    assert later.requests == evaluation.requests == 3 * (9 + 5)
    later.finish()

    separate = Run(run.path.with_name("separate") / run.path.name, run.tasks, run.members, run.base)
    other = separate.evaluation(workers)
    other.add(wanted)
    other.finish()
    assert [{**r, "seconds": 0} for r in later.rows] == [{**r, "seconds": 0} for r in other.rows]


def test_scores_do_not_depend_on_the_routers_that_were_scored_before(
    run: Run, workers: LocalWorkers
) -> None:
    wanted = routers("base", "phatgoose")
    together = run.evaluation(workers)
    together.add(wanted)
    together.finish()
    for name, router in wanted.items():
        separate = Run(run.path.with_name(name) / "run", run.tasks, run.members, run.base)
        rows = separate.evaluation(workers).run(name, router)
        expected = [{**row, "seconds": 0} for row in together.routers[name].rows]
        assert [{**row, "seconds": 0} for row in rows] == expected
    values = [[row["value"] for row in state.rows] for state in together.routers.values()]
    assert values[0] != values[1]


def test_a_complete_router_does_not_wait_for_others(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    workers.most = 1
    evaluation.add(routers("base", "phatgoose"))
    while evaluation.routers["base"].state != "done":
        evaluation.step()
    assert evaluation.routers["base"].rows
    state = evaluation.routers["phatgoose"]
    assert state.state == "asking"
    assert state.open
    evaluation.finish()
    assert state.rows


def test_no_more_than_so_many_shards_wait(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base", "phatgoose"))
    evaluation.ask(3)
    assert workers.waiting == 3
    evaluation.ask(3)
    assert workers.waiting == 3
    evaluation.finish()


def test_asking_ends_after_a_while(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.evaluation.stage._ASK_SECONDS", -1.0)
    evaluation = run.evaluation(workers)
    evaluation.add(routers("base"))
    evaluation.ask(100)
    assert workers.waiting == 1
    assert evaluation.has_more
    evaluation.finish()
    assert workers.calls == len(evaluation.shards) > 1
    assert not evaluation.has_more


@pytest.mark.parametrize(
    "changes",
    [
        {"members": 2},
        {"dtype": "bfloat16"},
        {"tokens": 100},
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
    evaluation = run.evaluation(workers)
    two = evaluation.run("phatgoose", make_router("phatgoose", top_k=2))
    assert [row["top_k"] for row in (one[0], two[0])] == [1, 2]
    assert [row["value"] for row in one] != [row["value"] for row in two]


def test_results_of_other_routers_and_suites_stay(
    run: Run, workers: LocalWorkers, tasks: list[TaskData]
) -> None:
    def evaluate(suite: str, chosen: list[TaskData], *names: str) -> None:
        evaluation = run.evaluation(workers, suite=suite, tasks=chosen)
        evaluation.add(routers(*names))
        evaluation.finish()
        evaluation.write_scores()

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
    for suite in ("held", "second"):
        samples = run.table(f"samples/{suite}/base.parquet")
        assert {(row["suite"], row["task"]) for row in samples} == {(suite, "swans")}
    assert "suite second" in make_report(run.folder)


def test_results_of_another_pool_are_dropped(run: Run, workers: LocalWorkers) -> None:
    two = Members(dict(list(run.members.experts.items())[:2]))
    for members, name in ((run.members, "merged"), (two, "base")):
        evaluation = run.evaluation(workers, members=members)
        evaluation.run(name, make_router(name))
        evaluation.write_scores()
    rows = run.table("scores.parquet")
    assert {(row["manifest"], row["router"]) for row in rows} == {(pool_id(two.experts), "base")}


def changed_code(monkeypatch: pytest.MonkeyPatch, router: str) -> None:
    """Change the source code of one router."""
    from harness import source_code
    from harness.evaluation import actor as eval_actor
    from harness.evaluation import identity

    def other(asked: Router) -> dict[str, str]:
        code = source_code.router_code(asked)
        return {**code, f"phatgoose.routers.{router}": "0" * 16} if asked.name() == router else code

    monkeypatch.setattr(identity, "router_code", other)
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
        evaluation.finish()
        evaluation.write_scores()
        return workers.calls - before

    shards = evaluate() // 3
    assert messages(caplog) == []
    assert evaluate() == 0
    changed_code(monkeypatch, "phatgoose")
    assert evaluate() == shards
    line = f"phatgoose.routers.phatgoose changed: {shards} shards of phatgoose are asked again"
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
    made = setting(run.path, workers)
    inputs = inputs_of(SuiteRequests("held", run.tasks), run.base, 40)
    counts = []
    other = dataclasses.replace(made.conditions, **{change: value})
    for conditions in (made.conditions, other):
        before = workers.calls
        evaluation = LocalEvaluation(
            dataclasses.replace(made, conditions=conditions), inputs, run.members
        )
        evaluation.announce(wanted)
        evaluation.finish()
        rows = evaluation.rows
        counts.append(workers.calls - before)
        if change in ("dtype", "device"):
            assert {row[change] for row in rows} == {getattr(conditions, change)}
    assert counts[0] == counts[1] > 0
    line = f"{word} changed: {counts[1]} shards of base, merged are asked again"
    # Modules are named if code changed; here only its hash was different.
    assert messages(caplog) == ([line] if word else [])


@pytest.mark.parametrize("damage", ["cut", "value", "empty", "lost"])
@pytest.mark.parametrize("scored", [True, False])
def test_a_damaged_answer_is_asked_again_with_a_message(
    run: Run, workers: LocalWorkers, caplog: pytest.LogCaptureFixture, damage: str, scored: bool
) -> None:
    def rows(evaluation: LocalEvaluation) -> list[dict[str, Any]]:
        found = evaluation.run("phatgoose", make_router("phatgoose"))
        return [{**row, "seconds": 0} for row in found]

    expected = rows(run.evaluation(workers))
    shutil.rmtree(run.path)
    evaluation = run.evaluation(workers)
    evaluation.add(routers("phatgoose"))
    if scored:
        evaluation.finish()
    else:
        evaluation.ask(10**6)
        for key, result in workers.step(0):
            evaluation.take(key, result)
    file = sorted(path for path in (run.path / "answers").rglob("*") if path.is_file())[-1]
    data = file.read_bytes()
    if damage == "lost":
        file.unlink()
    elif damage == "value":
        table = pq.read_table(file)
        place = table.schema.get_field_index("tokens")
        more = pc.add(table["tokens"], pa.array([1] * len(table)))
        pq.write_table(table.set_column(place, table.schema.field("tokens"), more), file)
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    before = workers.calls
    if not scored:  # it existed when the evaluation began
        assert rows(evaluation) == expected
        assert workers.calls == before + 1
        [message] = messages(caplog)
        how = "missing" if damage == "lost" else "damaged"
        assert f"{file.name} is {how}" in message
        assert message.endswith("; it is asked again")
    assert rows(run.evaluation(workers)) == expected
    before = workers.calls
    assert rows(run.evaluation(workers)) == expected
    assert workers.calls == before


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
