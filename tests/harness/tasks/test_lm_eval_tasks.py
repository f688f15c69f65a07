from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from harness.tasks import TaskData, TaskSpec, prepare_all
from harness.tasks.lm_eval_tasks import evaluation_table, make_task
from harness.tasks.records import Record, Split
from harness.tasks.store import read_records, write_task
from phatgoose.errors import PhatgooseError
from tests.support.toy import from_archive

Archive = Callable[[dict[str, Any]], Path]


class FakeLM(LM):
    """A language model that answers from two tables and records its requests."""

    def __init__(
        self,
        scores: dict[tuple[str, str], float] | None = None,
        answers: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.scores, self.answers = scores or {}, answers or {}
        self.asked: list[tuple[Any, ...]] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(self.scores[request.args], False) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def on_disk(folder: Path, kind: str, records: list[Record], **spec: Any) -> TaskData:
    """Write task data whose evaluation split has these records."""
    unseen = Record("toy", "f", "train", ["x"], [], [])
    splits: list[tuple[Split, Record]] = [("evaluation", record) for record in records]
    write_task(folder / "toy", "toy", [*splits, ("train", unseen)])
    counts: Any = {"train": 1, "evaluation": len(records)}
    made_from, folder = TaskSpec("toy", ("toy",), **spec), folder / "toy"
    return TaskData(made_from, folder / "train", folder / "evaluation", "00", counts, kind)  # type: ignore[arg-type]


def run(lm: LM, data: TaskData) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tasks = {"toy": make_task(data, "suite")}
    found = evaluate(
        lm=lm, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=10, log_samples=True
    )
    return found["results"]["toy"], found["samples"]["toy"]


def test_multiple_choice_is_scored_by_lm_eval(tmp_path: Path) -> None:
    records = [
        Record("toy", "1", "p1\nA: ", ["no"], ["yes, indeed", "no"], [1]),
        Record("toy", "2", "p2\nA: ", ["b", "cc"], ["aaaa", "b", "cc"], [1, 2]),
        Record("toy", "3", "p3\nA: ", ["a"], ["a", "b"], [0]),
        Record("toy", "4", "12", ["a"], ["a", "b"], [0]),
    ]
    scores = {
        # By sums "no" wins, which is right; by characters (-3/11 against -2/2) the long one wins.
        ("p1\nA: ", "yes, indeed"): -3.0,
        ("p1\nA: ", "no"): -2.0,
        # By sums "cc", by characters (-3/4, -9, -2/2) "aaaa": one of several right, then wrong.
        ("p2\nA: ", "aaaa"): -3.0,
        ("p2\nA: ", "b"): -9.0,
        ("p2\nA: ", "cc"): -2.0,
        # Wrong by both.
        ("p3\nA: ", "a"): -4.0,
        ("p3\nA: ", "b"): -1.0,
        # Right by both; the prompt is a number, which must stay text.
        ("12", "a"): -1.0,
        ("12", "b"): -4.0,
    }
    lm = FakeLM(scores)
    results, samples = run(lm, on_disk(tmp_path, "multiple_choice", records))
    assert lm.asked == list(scores)
    assert results["acc,none"] == 3 / 4
    assert results["acc_norm,none"] == 1 / 4
    assert results["acc_stderr,none"] == pytest.approx((3 / 4 * 1 / 4 / 3) ** 0.5)
    assert [sample["doc"]["document"] for sample in samples] == ["1", "2", "3", "4"]
    assert [sample["acc"] for sample in samples] == [1, 1, 0, 1]
    assert samples[1]["doc"]["correct"] == [1, 2]


def test_generation_is_scored_by_lm_eval(tmp_path: Path) -> None:
    records = [
        Record("toy", "1", "one ", ["three", "3"], [], []),
        Record("toy", "2", "two ", ["three"], [], []),
        Record("toy", "3", "three ", ["Three"], [], []),
        Record("toy", "4", "four ", ["three", "3", "drei"], [], []),
        Record("toy", "5", "five ", ["three"], [], []),
    ]
    answers = {"one ": " 3 ", "two ": "three.", "three ": "three", "four ": "drei\t", "five ": ""}
    lm = FakeLM(answers=answers)
    data = on_disk(tmp_path, "generation", records, max_new_tokens=7)
    results, samples = run(lm, data)
    greedy = {"until": ["\n"], "max_gen_toks": 7, "do_sample": False}
    assert lm.asked == [(prompt, greedy) for prompt in answers]
    assert [sample["exact_match"] for sample in samples] == [1, 0, 0, 1, 0]
    assert results["exact_match,none"] == 2 / 5
    assert samples[3]["filtered_resps"] == ["drei"]


def test_a_first_document_with_one_right_choice_does_not_hide_several_later(tmp_path: Path) -> None:
    """Check a task for which lm-eval decides by the first document whether targets are lists."""
    records = [
        Record("toy", "1", "p", ["a"], ["a", "b"], [0]),
        Record("toy", "2", "q", ["a", "b"], ["a", "b"], [0, 1]),
    ]
    scores = {("p", "a"): -1.0, ("p", "b"): -2.0, ("q", "a"): -2.0, ("q", "b"): -1.0}
    results, _ = run(FakeLM(scores), on_disk(tmp_path, "multiple_choice", records))
    assert results["acc,none"] == 1.0


def test_split_and_limit_select_the_documents(archive: Archive) -> None:
    examples = [{"input": f"question {i}", "target": "x"} for i in range(60)]
    path = archive({"toy": {"examples": examples}})

    def documents(**spec: Any) -> list[str]:
        (data,) = prepare_all([TaskSpec("toy", ("toy",), **spec)], from_archive(path))
        ids: list[str] = evaluation_table(data)["document"].to_pylist()
        assert len(make_task(data, "suite").eval_docs) == len(ids)
        return ids

    (data,) = prepare_all([TaskSpec("toy", ("toy",))], from_archive(path))
    trained_on = {record.document for record in read_records(data.train)}
    assert not trained_on & set(documents())
    assert len(documents(split="all")) == 60
    some = documents(split="all", limit=20)
    assert some == documents(split="all")[:20]
    inputs = [f"\nQ: question {i}\nA: " for i in range(20)]
    (data,) = prepare_all([TaskSpec("toy", ("toy",), split="all", limit=20)])
    table = evaluation_table(data)
    assert set(table["input"].to_pylist()) != set(inputs)


def test_an_empty_evaluation_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"task toy has no document.*split: all"):
        make_task(on_disk(tmp_path, "generation", []), "suite")
