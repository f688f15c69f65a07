import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import __version__ as transformers_version

from harness import run_folder
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.stage import Evaluation
from harness.planning.estimate import evaluation_work
from harness.registry.packs import Members, pool_id
from harness.reporting.report import make_report
from harness.storage import Folder
from harness.tasks import TaskData, TaskSpec
from harness.tasks.records import Record
from harness.tasks.store import read_records
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router, make_router
from phatgoose.tokenization import encode_pair
from tests.plain import plain_score
from tests.tiny import make_experts
from tests.toy import LocalWorkers, local_actor, members_of, prepare_toys, setting

EXPERTS = ["e0", "e1", "e2"]
SWANS = TaskSpec("swans", ("swans",), split="all", limit=9)
SUMS = TaskSpec("sums", ("sums",), split="all", limit=5, max_new_tokens=4)


class NoWorkers(LocalWorkers):
    """Everything must be in the journal."""

    def add(self, method: str, calls: Any) -> range:
        assert not calls
        return range(0)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TaskData]:
    """One task of choices and one of generation."""
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    return prepare_toys([SWANS, SUMS], tmp_path)


@pytest.fixture
def workers(llama: Base) -> LocalWorkers:
    return LocalWorkers(local_actor(llama, make_experts(llama, len(EXPERTS))))


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


@pytest.fixture
def run(tmp_path: Path, tasks: list[TaskData], llama: Base) -> Run:
    return Run(tmp_path / "run", tasks, members_of(make_experts(llama, len(EXPERTS))))


def routers(*names: str) -> dict[str, Router]:
    return {name: make_router(name) for name in names}


def documents(data: TaskData) -> dict[str, Record]:
    return {r.document: r for r in read_records(data.train) + read_records(data.evaluation)}


def plain(base: Base, context: str, choice: str) -> Any:
    return plain_score(base, *encode_pair(base, context, choice))


def test_choices_are_measured_as_computed_by_hand(
    run: Run, workers: LocalWorkers, llama: Base, tasks: list[TaskData]
) -> None:
    rows = run.evaluation(workers).run("single:e1", make_router("single:e1"))
    samples = [row for row in run.table("samples/single@e1.parquet") if row["task"] == "swans"]
    known = documents(tasks[0])
    assert len(samples) == 9
    by_hand: dict[str, list[float]] = {}
    for sample in samples:
        record = known[sample["document"]]
        scores = [plain(llama, record.input, choice) for choice in record.choices]
        sums = [score.loglikelihood for score in scores]
        means = [
            (score.loglikelihood + score.eos_loglikelihood) / (score.tokens + 1) for score in scores
        ]
        normed = [s / len(c) for s, c in zip(sums, record.choices, strict=True)]
        [right] = record.correct
        expected = {
            "acc": float(sums.index(max(sums)) == right),
            "acc_norm": float(normed.index(max(normed)) == right),
            "acc_paper": float(means.index(max(means)) == right),
            "nll": -means[right],
            # BIG-bench: of three choices one is right, so that chance is one third.
            "multiple_choice_grade": float(sums.index(max(sums)) == right),
            "bigbench_normalized": 1.0 if sums.index(max(sums)) == right else -0.5,
        }
        assert dict(sample["metrics"]) == pytest.approx(expected, abs=1e-4)
        assert sample["choice_scores"] == pytest.approx(sums, abs=1e-4)
        assert sample["target"] == record.choices[right]
        assert sample["prediction"] == record.choices[sums.index(max(sums))]
        assert sample["correct"] == bool(expected["acc"])
        for metric, value in expected.items():
            by_hand.setdefault(metric, []).append(value)
    scored = {row["metric"]: row for row in rows if row["task"] == "swans"}
    assert scored.keys() == by_hand.keys()
    for metric, values in by_hand.items():
        assert scored[metric]["value"] == pytest.approx(statistics.fmean(values), abs=1e-4)
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert scored[metric]["stderr"] == pytest.approx(error, abs=1e-4)
        assert scored[metric]["n"] == 9
    assert len({round(value, 3) for value in by_hand["nll"]}) > 1


def test_generated_answers_are_measured_as_computed_by_hand(
    run: Run, workers: LocalWorkers, llama: Base, tasks: list[TaskData]
) -> None:
    rows = run.evaluation(workers).run("base", make_router("base"))
    samples = [row for row in run.table("samples/base.parquet") if row["task"] == "sums"]
    assert len(samples) == 5
    for sample in samples:
        record = documents(tasks[1])[sample["document"]]
        score = plain(llama, record.input, "nine")
        mean = (score.loglikelihood + score.eos_loglikelihood) / (score.tokens + 1)
        metrics = dict(sample["metrics"])
        assert metrics["nll"] == pytest.approx(-mean, abs=1e-4)
        assert metrics["exact_match"] == float(sample["prediction"] == "nine")
        assert sample["target"] == "nine"
        assert sample["choice_scores"] == []
        assert sample["prediction"] == sample["prediction"].strip()
    scored = {row["metric"]: row["value"] for row in rows if row["task"] == "sums"}
    assert scored.keys() == {"exact_match", "nll", "bigbench_normalized"}
    assert scored["bigbench_normalized"] == scored["exact_match"]


def test_rows_say_what_they_are_of(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    rows = [row for n, r in routers("base", "phatgoose").items() for row in evaluation.run(n, r)]
    evaluation.write_scores(rows)
    table = run.table("scores.parquet")
    assert len(table) == 2 * (6 + 3)
    for row in table:
        manifest = pool_id(run.members.experts)
        assert (row["run"], row["base"], row["manifest"]) == ("run", "tiny", manifest)
        assert row["suite"] == "held"
        assert row["zero_shot"]
        assert row["expert"] is None
        assert row["top_k"] == (2 if row["router"] == "phatgoose" else None)
        assert row["tokens"] > 0
        assert row["seconds"] > 0


def test_documents_whose_prompt_is_cut_are_counted(
    run: Run, workers: LocalWorkers, llama: Base, tasks: list[TaskData]
) -> None:
    """The last token of a choice is read by nothing, so a row may be longer by one."""
    known, needed = documents(tasks[0]), []
    for document in sorted(known)[:9]:  # those that are asked
        pairs = [encode_pair(llama, known[document].input, c) for c in known[document].choices]
        needed.append(max(len(context) + len(choice) - 2 for context, choice in pairs))
    room = max(needed) - 1
    llama.model.config.max_position_embeddings = room
    rows = run.evaluation(workers).run("base", make_router("base"))
    cut = [length > room for length in needed]
    counts = {row["task"]: row["cut"] for row in rows}
    assert counts == {"swans": sum(cut), "sums": 0}
    assert 0 < sum(cut) < len(cut)


def test_routing_is_recorded_for_routers_that_choose(
    run: Run, workers: LocalWorkers, llama: Base
) -> None:
    evaluation = run.evaluation(workers)
    for name, router in routers("base", "phatgoose", "merged").items():
        evaluation.run(name, router)
    assert run.folder.names("routing/") == ["routing/phatgoose.parquet"]
    rows = run.table("routing/phatgoose.parquet")
    assert len(rows) == 2 * len(llama.linears) * len(EXPERTS)
    order = [row["linear"] for row in rows if (row["task"], row["expert"]) == ("swans", "e0")]
    assert order == list(llama.linears)  # rows in model order
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["linear"]), []).append(row)
    for group in groups.values():
        assert [row["expert"] for row in group] == EXPERTS
        shares = [row["share"] for row in group]
        assert sum(shares) == pytest.approx(1)
        entropy = -sum(share * math.log(share) for share in shares if share)
        assert [row["entropy"] for row in group] == pytest.approx([entropy] * 3)
        assert all(row["tokens"] > 0 for row in group)


def test_the_oracle_is_the_best_single_expert(run: Run, workers: LocalWorkers) -> None:
    names = [f"single:{expert}" for expert in EXPERTS]
    evaluation = run.evaluation(workers)
    rows = [row for n, r in routers("base", *names).items() for row in evaluation.run(n, r)]
    evaluation.write_scores(rows, derived={"oracle"})
    table = run.table("scores.parquet")
    oracle = [row for row in table if row["router"] == "oracle"]
    assert {(row["task"], row["metric"]) for row in oracle} == {
        (row["task"], row["metric"]) for row in table
    }
    for row in oracle:
        assert not row["zero_shot"]
        singles = {
            other["router"]: other["value"]
            for other in table
            if other["router"] in names
            and (other["task"], other["metric"]) == (row["task"], row["metric"])
        }
        best = min if row["metric"] == "nll" else max
        assert row["value"] == best(singles.values()) == singles[f"single:{row['expert']}"]


def test_a_second_run_asks_nothing_and_says_the_same(
    run: Run, workers: LocalWorkers, tasks: list[TaskData]
) -> None:
    wanted = routers("base", "phatgoose", "single:e0")

    def evaluate(workers: LocalWorkers) -> list[dict[str, Any]]:
        evaluation = run.evaluation(workers)
        rows = [row for name, router in wanted.items() for row in evaluation.run(name, router)]
        evaluation.write_scores(rows, derived={"oracle"})
        assert evaluation.requests == 3 * (9 + 5)  # what is found counts, too
        return run.table("scores.parquet")

    first = evaluate(workers)
    assert evaluation_work(tasks, 150).requests == 9 + 5
    assert len(run.folder.names("journal/")) == 3 * evaluation_work(tasks, 150).chunks
    files = {name: run.folder.read(name) for name in run.folder.names()}
    assert evaluate(NoWorkers(None)) == first  # the seconds of the first time among them
    assert {name: run.folder.read(name) for name in run.folder.names()} == files


def test_asking_ahead_leaves_nothing_to_ask(run: Run, workers: LocalWorkers) -> None:
    wanted = routers("base", "phatgoose", "merged")
    evaluation = run.evaluation(workers)
    evaluation.ask(wanted)
    assert evaluation.open_routers == {*wanted}
    while evaluation.is_waiting:
        evaluation.step(0)
    assert workers.calls == len(run.folder.names("journal/")) == 3 * len(evaluation.chunks)
    evaluation.ask(wanted)  # again: there is nothing to ask
    assert not evaluation.is_waiting
    later = run.evaluation(NoWorkers(None))  # of the next call of the run
    later.ask(wanted)
    assert later.requests == evaluation.requests == 3 * (9 + 5)
    evaluation._workers = NoWorkers(None)
    rows = [row for name in wanted for row in evaluation.run(name, wanted[name])]

    separate = Run(run.path.with_name("separate") / run.path.name, run.tasks, run.members)
    other = separate.evaluation(workers)
    expected = [row for name, router in wanted.items() for row in other.run(name, router)]
    assert [{**r, "seconds": 0} for r in rows] == [{**r, "seconds": 0} for r in expected]


def test_a_router_that_is_complete_waits_for_no_other(run: Run, workers: LocalWorkers) -> None:
    wanted, evaluation = routers("base", "phatgoose"), run.evaluation(workers)
    workers.most = 1
    evaluation.ask(wanted)
    assert evaluation.run("base", wanted["base"])
    assert evaluation.open_routers == {"phatgoose"}
    assert evaluation.run("phatgoose", wanted["phatgoose"])


def test_an_actor_heeds_the_order_of_the_pool(run: Run, workers: LocalWorkers) -> None:
    turned = Members(dict(reversed(run.members.experts.items())))
    shares = []
    for name, members in (("as-is", run.members), ("turned", turned)):
        other = Run(run.path.with_name(name), run.tasks, members)
        other.evaluation(workers).run("phatgoose", make_router("phatgoose"))
        rows = other.table("routing/phatgoose.parquet")
        shares.append({(r["task"], r["linear"], r["expert"]): r["share"] for r in rows})
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"members": 2},
        {"dtype": "bfloat16"},
        {"characters": 400},
    ],
    ids=["pool", "dtype", "chunks"],
)
def test_other_answers_are_asked_anew(
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
def test_answers_that_need_no_other_expert_stay_when_the_pool_grows(
    run: Run, workers: LocalWorkers, name: str
) -> None:
    small = Members({"e1": run.members.experts["e1"]})
    run.evaluation(workers, members=small).run(name, make_router(name))
    before = workers.calls
    run.evaluation(workers).run(name, make_router(name))
    assert workers.calls == before


def test_a_router_with_other_options_is_asked_anew(run: Run, workers: LocalWorkers) -> None:
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
        ("held", "merged", "swans"),  # and no sums, which base has no longer
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


def test_results_of_another_pool_do_not_stay(run: Run, workers: LocalWorkers) -> None:
    two = Members(dict(list(run.members.experts.items())[:2]))
    for members, name in ((run.members, "merged"), (two, "base")):
        evaluation = run.evaluation(workers, members=members)
        evaluation.write_scores(evaluation.run(name, make_router(name)))
    rows = run.table("scores.parquet")
    assert {(row["manifest"], row["router"]) for row in rows} == {(pool_id(two.experts), "base")}


def test_a_failure_says_which_router_and_task(run: Run, workers: LocalWorkers) -> None:
    with pytest.raises(PhatgooseError, match="the pool has no expert 'e9': it has e0, e1, e2"):
        run.evaluation(workers).run("single:e9", make_router("single:e9"))
    assert run.folder.names() == []


def test_what_was_answered_before_a_failure_is_kept(run: Run, workers: LocalWorkers) -> None:
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
    """Let the source code of one router be another."""
    from harness import source_code
    from harness.evaluation import actor as eval_actor
    from harness.evaluation import stage as evaluate

    def other(asked: Router) -> dict[str, str]:
        code = source_code.router_code(asked)
        return {**code, f"phatgoose.routers.{router}": "0" * 16} if asked.name() == router else code

    monkeypatch.setattr(evaluate, "router_code", other)
    monkeypatch.setattr(eval_actor, "router_code", other)


def test_an_edited_router_is_asked_again_and_said_to_be(
    run: Run,
    workers: LocalWorkers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = routers("base", "phatgoose", "merged")

    def evaluate() -> int:
        before, evaluation = workers.calls, run.evaluation(workers)
        evaluation.announce(wanted)
        for name, router in wanted.items():
            evaluation.run(name, router)
        return workers.calls - before

    chunks = evaluate() // 3
    assert capsys.readouterr().err == ""
    assert evaluate() == 0
    changed_code(monkeypatch, "phatgoose")
    assert evaluate() == chunks
    assert capsys.readouterr().err == (
        f"phatgoose.routers.phatgoose changed: {chunks} chunks of phatgoose are asked again\n"
    )
    assert evaluate() == 0
    assert capsys.readouterr().err == ""


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
    capsys: pytest.CaptureFixture[str],
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
    line = capsys.readouterr().err
    # Modules are named where code changed; here only its hash was another.
    assert line == (
        f"{word} changed: {counts[1]} chunks of base, merged are asked again\n" * bool(word)
    )


@pytest.mark.parametrize("damage", ["cut", "number", "empty"])
def test_a_damaged_answer_is_asked_again_with_a_line(
    run: Run, workers: LocalWorkers, capsys: pytest.CaptureFixture[str], damage: str
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
    error = capsys.readouterr().err
    assert file.name in error
    assert error.count("\n") == 1
    assert "is damaged; it is asked again" in error
    assert evaluate() == first
    assert workers.calls == before + 1


def test_rows_say_what_computed_them(run: Run, workers: LocalWorkers) -> None:
    evaluation = run.evaluation(workers)
    rows = [row for n, r in routers("base", "merged").items() for row in evaluation.run(n, r)]
    evaluation.write_scores(rows)
    table = run.table("scores.parquet")
    assert {row["dtype"] for row in table} == {"float32"}
    assert {row["device"] for row in table} == {"cpu"}
    versions = {
        "lm_eval": version("lm_eval"),
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers_version,
    }
    assert {row["versions"] for row in table} == {json.dumps(versions, sort_keys=True)}
    assert len({row["code"] for row in table}) == 1
    by_router = {row["router"]: row["router_code"] for row in table}
    assert len({*by_router.values()}) == 2


def test_a_lost_answer_is_asked_again(
    run: Run, workers: LocalWorkers, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was there when the evaluation began."""
    run.evaluation(workers).run("merged", make_router("merged"))
    before, evaluation = workers.calls, run.evaluation(workers)
    file = sorted((run.path / "journal").iterdir())[0]
    file.unlink()
    evaluation.run("merged", make_router("merged"))
    assert workers.calls == before + 1
    assert f"{file.name} is gone; it is asked again" in capsys.readouterr().err


def test_an_actor_with_other_code_of_a_router_refuses(
    run: Run, workers: LocalWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plugin, say, whose files differ between nodes."""
    from harness import source_code
    from harness.evaluation import actor as eval_actor

    changed_code(monkeypatch, "merged")
    monkeypatch.setattr(eval_actor, "router_code", source_code.router_code)
    with pytest.raises(PhatgooseError, match="code of router merged on this node is not the driv"):
        run.evaluation(workers).run("merged", make_router("merged"))
    assert run.evaluation(workers).run("base", make_router("base"))
