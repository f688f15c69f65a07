"""Check lm-eval's own tasks, from YAML files and from its packaged definitions over local data."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from harness.evaluation.requests import SuiteRequests
from harness.run_folder import SAMPLES, SCORES, read_table
from harness.storage import Folder
from harness.tasks import TaskData, TaskSpec, prepare_all, task_specs
from harness.tasks.lm_eval_export import write_for_lm_eval
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.sources import lm_eval
from harness.tasks.store import read_records
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.routers import make_router
from tests.support.evaluations import LocalEvaluation
from tests.support.tiny import make_experts
from tests.support.toy import (
    LocalWorkers,
    from_archive,
    inputs_of,
    local_actor,
    members_of,
    setting,
    write_archive,
)

DOCS: list[dict[str, Any]] = [
    {"q": f"Is the {name} {deed}?", "a": ["yes", "no"], "gold": i % 2, "say": "goose"}
    for i, (name, deed) in enumerate(
        (name, deed) for name in ("goose", "lake", "swan") for deed in ("deep", "grey", "dry")
    )
]


@pytest.fixture(scope="module", autouse=True)
def only_our_definitions() -> Iterator[None]:
    """Leave out the packaged definitions, which are slow to read, unless a test requests them."""
    from lm_eval.tasks import TaskManager

    def manager(include_path: str | None) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "_manager", manager)
        yield
    lm_eval._load.cache_clear()


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """Write a user's definitions over a JSON Lines file."""
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "Question: {{q}}\nAnswer:",
    }
    generation = {
        **shared,
        "output_type": "generate_until",
        "doc_to_target": "{{say}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    }
    first = {"function": "take_first"}
    regex = {"function": "regex", "regex_pattern": r"(goose|lake)"}
    tasks: dict[str, dict[str, Any]] = {
        "own_choice": {
            **shared,
            "output_type": "multiple_choice",
            "doc_to_choice": "a",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "f1"}],
        },
        "own_filters": {
            **generation,
            "metric_list": [{"metric": "exact_match", "ignore_case": True}],
            "filter_list": [
                {"name": "strict-match", "filter": [first]},
                {"name": "flexible-extract", "filter": [regex, first]},
            ],
        },
        "own_words": {
            **shared,
            "output_type": "loglikelihood",
            "doc_to_target": "{{say}}",
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "own", "task": list(tasks)}))
    return folder


def suite(folder: Path, *names: str, **keys: Any) -> dict[str, Any]:
    group = {"name": "own", "source": "lm_eval", "lm_eval": list(names)}
    return {**group, "include_path": str(folder), **keys}


def test_groups_expand_to_tasks_with_the_documents_of_lm_eval(own_tasks: Path) -> None:
    specs = task_specs(suite(own_tasks, "own"))
    assert [spec.name for spec in specs] == ["own_choice", "own_filters", "own_words"]
    choice, filters, words = prepare_all(specs)
    rows = evaluation_table(choice).to_pylist()
    assert [row["text"].partition("?")[0] for row in rows] == [
        doc["q"].partition("?")[0] for doc in DOCS
    ]
    assert [row["correct"] for row in rows] == [[doc["gold"]] for doc in DOCS]
    assert rows[0]["input"] == "Question: Is the goose deep?\nAnswer:"
    assert (choice.kind, filters.kind, words.kind) == (
        "multiple_choice",
        "generation",
        "generation",
    )
    (limited,) = prepare_all(task_specs(suite(own_tasks, "own_choice", limit=4)))
    assert evaluation_table(limited).to_pylist() == rows[:4]


def evaluate(folder: Folder, suite: str, data: list[TaskData], base: Base) -> LocalEvaluation:
    experts = make_experts(base, 2)
    workers = LocalWorkers(local_actor(base, experts))
    made = setting(Path(str(folder)), workers)
    inputs = inputs_of(SuiteRequests(suite, data), base, 100)
    return LocalEvaluation(made, inputs, members_of(experts))


def test_values_match_lm_eval_with_a_reference_model(
    own_tasks: Path, tmp_path: Path, llama: Base
) -> None:
    """Compare with lm-eval and its own HFLM over the same base."""
    names = ("own_choice", "own_filters", "own_words")
    data = prepare_all(task_specs(suite(own_tasks, *names, limit=6)))
    folder = Folder(tmp_path / "run")
    evaluation = evaluate(folder, "own", data, llama)
    evaluation.run("base", make_router("base"))
    evaluation.write_scores()
    rows = read_table(folder, "scores.parquet", SCORES).to_pylist()
    found = {(row["task"], row["metric"]): row for row in rows}

    model = HFLM(pretrained=llama.model, tokenizer=llama.tokenizer, batch_size=2)
    manager = lm_eval._manager(str(own_tasks))
    expected = simple_evaluate(
        model, tasks=list(names), task_manager=manager, limit=6, bootstrap_iters=10
    )["results"]
    for task, metric, key in (
        ("own_choice", "acc", "acc,none"),
        ("own_choice", "f1", "f1,none"),
        ("own_filters", "exact_match_strict_match", "exact_match,strict-match"),
        ("own_filters", "exact_match_flexible_extract", "exact_match,flexible-extract"),
        ("own_words", "acc", "acc,none"),
        ("own_words", "perplexity", "perplexity,none"),
    ):
        assert found[task, metric]["value"] == pytest.approx(expected[task][key], rel=1e-4), metric
        assert found[task, metric]["n"] == 6
    samples = read_table(folder, "samples/own/base.parquet", SAMPLES).to_pylist()
    by_task: dict[str, list[dict[str, float]]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], []).append(dict(sample["metrics"]))
    # F1 is not a mean over documents, so it has no value per document.
    assert by_task["own_choice"][0].keys() == {"acc", "acc_paper", "nll"}
    accuracy = statistics.fmean(metrics["acc"] for metrics in by_task["own_choice"])
    assert accuracy == found["own_choice", "acc"]["value"]
    assert all("nll" in metrics for metrics in by_task["own_filters"])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 3, "until": ["zzz"]},
        {"max_tokens": 3, "until": "zzz", "do_sample": False, "temperature": 0.9},
        {"max_gen_toks": 6, "until": ["e", "a", "o"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_texts_match_lm_eval_for_every_name_of_the_limit(
    own_tasks: Path, tmp_path: Path, llama: Base, options: dict[str, Any]
) -> None:
    definition = yaml.safe_load((own_tasks / "own_filters.yaml").read_text())
    definition |= {"task": "own_limit", "generation_kwargs": options, "filter_list": None}
    (own_tasks / "own_limit.yaml").write_text(yaml.safe_dump(definition))
    data = prepare_all(task_specs(suite(own_tasks, "own_limit")))
    folder = Folder(tmp_path / "run")
    evaluate(folder, "own", data, llama).run("base", make_router("base"))
    samples = read_table(folder, "samples/own/base.parquet", SAMPLES).to_pylist()

    model = HFLM(pretrained=llama.model, tokenizer=llama.tokenizer, batch_size=1)
    manager = lm_eval._manager(str(own_tasks))
    known = simple_evaluate(
        model, tasks=["own_limit"], task_manager=manager, bootstrap_iters=10, log_samples=True
    )["samples"]["own_limit"]
    expected = [sample["filtered_resps"][0] for sample in known]
    assert [sample["prediction"] for sample in samples] == expected
    assert any(expected)


def test_lm_eval_tasks_are_summarized(own_tasks: Path, tmp_path: Path, llama: Base) -> None:
    from harness.reporting.report import make_report

    data = prepare_all(task_specs(suite(own_tasks, "own", limit=5)))
    folder = Folder(tmp_path / "run")
    evaluation = evaluate(folder, "own", data, llama)
    evaluation.add({name: make_router(name) for name in ("base", "merged")})
    evaluation.finish()
    evaluation.write_scores()
    text = make_report(folder)
    assert "exact_match_strict_match" in text.replace("\n", "") or "strict" in text
    assert "own_words" in text


def test_invalid_tasks_are_refused(own_tasks: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"no task or group own_choce: did you mean own_choi"):
        task_specs(suite(own_tasks, "own_choce"))
    path = own_tasks / "own_choice.yaml"
    task = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**task, "output_type": "loglikelihood_rolling"}))
    with pytest.raises(PhatgooseError, match="own_choice of lm-eval needs loglikelihood_rollin"):
        prepare_all(task_specs(suite(own_tasks, "own_choice")))
    path.write_text(yaml.safe_dump({**task, "dataset_path": "owner/gone", "dataset_kwargs": {}}))
    lm_eval._load.cache_clear()
    with pytest.raises(PhatgooseError, match=r"own_choice: data set owner/gone .*overlay="):
        prepare_all(task_specs(suite(own_tasks, "own_choice")))


@pytest.mark.slow(seconds=15)
def test_packaged_definitions_run_over_exported_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Base
) -> None:
    """Run bigbench_*_multiple_choice and bbh, as packaged, over the documents of our own tasks."""
    from lm_eval.tasks import TaskManager

    packaged = TaskManager()
    monkeypatch.setattr(lm_eval, "_manager", lambda include_path: packaged)
    asked = [
        {"input": doc["q"], "target_scores": {"yes": 1 - doc["gold"], "no": doc["gold"]}}
        for doc in DOCS
    ]
    archive = write_archive(
        tmp_path / "archive.tar.gz",
        {"strategyqa": {"examples": asked}, "causal_judgment": {"examples": asked[::-1]}},
    )
    truth = [{"input": doc["q"], "target": ["True", "False"][doc["gold"]]} for doc in DOCS]
    for name in ("boolean_expressions", "web_of_lies"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"examples": truth}))
    of_bigbench = [TaskSpec(name, (name,)) for name in ("strategyqa", "causal_judgment")]
    of_release = [
        TaskSpec(name, (name,), "bbh", folder=str(tmp_path))
        for name in ("boolean_expressions", "web_of_lies")
    ]
    ours = prepare_all(of_bigbench, from_archive(archive)) + prepare_all(of_release)
    group = write_for_lm_eval(ours, tmp_path / "files")
    assert group["lm_eval"] == [
        "bigbench_strategyqa_multiple_choice",
        "bigbench_causal_judgment_multiple_choice",
        "bbh_zeroshot_boolean_expressions",
        "bbh_zeroshot_web_of_lies",
    ]
    found = prepare_all(task_specs(group))
    for own, theirs in zip(ours, found, strict=True):
        records = sorted(
            read_records(own.train) + read_records(own.evaluation), key=lambda r: r.document
        )
        rows = evaluation_table(theirs).to_pylist()
        assert len(rows) == len(records) == 9
        for record, row in zip(records, rows, strict=True):
            assert record.text in row["input"]
            assert row["targets"] == record.targets
            assert row["choices"] == record.choices
            assert row["correct"] == record.correct
    folder = Folder(tmp_path / "run")
    rows = evaluate(folder, "packaged", found, llama).run("base", make_router("base"))
    assert {row["task"] for row in rows} == set(group["lm_eval"])
    assert {row["n"] for row in rows} == {9}
    assert len(task_specs({**group, "lm_eval": ["bbh_zeroshot"]})) == 27
