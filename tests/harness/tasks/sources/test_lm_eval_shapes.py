"""Compare lm-eval tasks other than one prompt with choices with lm-eval's own values."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from harness.evaluation.requests import SuiteRequests
from harness.run_folder import SAMPLES, read_table
from harness.storage import Folder
from harness.tasks import TaskSpec, prepare_all, task_specs, unreachable
from harness.tasks.sources import lm_eval
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.routers import make_router
from tests.support.evaluations import LocalEvaluation
from tests.support.plain import plain_score
from tests.support.tiny import make_experts
from tests.support.toy import LocalWorkers, inputs_of, local_actor, members_of, setting

DOCS: list[dict[str, Any]] = [
    {"q": f"Is the {name} {deed}?", "a": ["yes", "no", "the goose"], "gold": (i * 7) % 3}
    for i, (name, deed) in enumerate(
        (name, deed) for name in ("goose", "lake", "swan") for deed in ("deep", "grey", "dry")
    )
]
SENTENCES = [
    {"sentence": f"The goose {deed} and the _ {end}", "option1": "swan", "option2": "lake", "n": n}
    for n, (deed, end) in enumerate(
        [("flies", "is deep."), ("is grey", "swims."), ("swims", "is dry."), ("answers", "flies.")]
    )
]
UTILS = """
def doc_to_text(doc):
    return doc["n"] % 2

def doc_to_choice(doc):
    start = doc["sentence"].partition("_")[0]
    return [start + doc["option1"], start + doc["option2"]]

def doc_to_target(doc):
    return doc["sentence"].partition("_")[2].strip()
"""


@pytest.fixture(scope="module", autouse=True)
def only_our_definitions() -> Iterator[None]:
    from lm_eval.tasks import TaskManager

    def manager(include_path: str | None) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "_manager", manager)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder of definitions over JSON Lines files."""
    made = tmp_path / "tasks"
    made.mkdir()
    for name, rows in (("docs", DOCS), ("sentences", SENTENCES)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "utils.py").write_text(UTILS)
    choice = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(made / "docs.jsonl") for split in ("train", "test")}
        },
        "test_split": "test",
        "training_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{q}}\nAnswer:",
        "doc_to_choice": "a",
        "doc_to_target": "gold",
    }
    write(made, "few_shot", {**choice, "num_fewshot": 2, "metric_list": [{"metric": "acc"}]})
    write(made, "repeated", {**choice, "repeats": 3, "metric_list": [{"metric": "acc"}]})
    write(
        made,
        "written",
        {
            **{key: value for key, value in choice.items() if key != "doc_to_choice"},
            "output_type": "generate_until",
            "doc_to_target": "{{a[gold]}}",
            "generation_kwargs": {"until": ["y"], "max_gen_toks": 4},
            "repeats": 3,
            "metric_list": [{"metric": "exact_match"}],
            "filter_list": [
                {
                    "name": "none",
                    "filter": [{"function": "majority_vote"}, {"function": "take_first"}],
                }
            ],
        },
    )
    mutual = [{"metric": "acc"}, {"metric": "acc_mutual_info"}]
    write(made, "mutual", {**choice, "metric_list": mutual})
    (made / "several.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "several",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(made / "sentences.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "metric_list": [{"metric": "acc"}],
            }
        )
        + "".join(
            f"doc_to_{name}: !function utils.doc_to_{name}\n"
            for name in ("text", "choice", "target")
        )
    )
    return made


def write(folder: Path, name: str, task: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))


def specs(folder: Path, *names: str) -> list[TaskSpec]:
    group = {"name": "own", "source": "lm_eval", "lm_eval": list(names)}
    return task_specs({**group, "include_path": str(folder)})


def evaluation(folder: Path, run: Path, base: Base, *names: str) -> LocalEvaluation:
    experts = make_experts(base, 2)
    made = setting(run, LocalWorkers(local_actor(base, experts)))
    requests = SuiteRequests("own", prepare_all(specs(folder, *names)))
    return LocalEvaluation(made, inputs_of(requests, base, 100), members_of(experts))


def reference_values(folder: Path, base: Base, name: str) -> dict[str, Any]:
    model = HFLM(
        pretrained=base.model,
        tokenizer=base.tokenizer,
        batch_size=2,
        backend="seq2seq" if base.is_encoder_decoder else "causal",
    )
    manager = lm_eval._manager(str(folder))
    found = simple_evaluate(model, tasks=[name], task_manager=manager, log_samples=True)
    return {**found["results"][name], "samples": found["samples"][name]}


@pytest.mark.parametrize("name", ["few_shot", "mutual", "several", "repeated"])
def test_values_match_lm_eval(folder: Path, tmp_path: Path, base: Base, name: str) -> None:
    expected = reference_values(folder, base, name)
    run = Folder(tmp_path / "run")
    # A preceding task must not change anything.
    rows = evaluation(folder, tmp_path / "run", base, "few_shot", name).run(
        "base", make_router("base")
    )
    values = {row["metric"]: row["value"] for row in rows if row["task"] == name}
    for key, value in expected.items():
        if key.endswith(",none") and not key.endswith("_stderr,none"):
            assert values[key.partition(",")[0]] == pytest.approx(value, abs=1e-9), key
    table = read_table(run, "samples/own/base.parquet", SAMPLES).to_pylist()
    samples = [sample for sample in table if sample["task"] == name]
    assert len(samples) == len(expected["samples"])
    for sample, logged in zip(samples, expected["samples"], strict=True):
        theirs = [response[0][0] for response in logged["resps"]]
        ours = sample["choice_scores"]
        assert ours == pytest.approx(theirs[: len(ours)], abs=1e-4)
        assert len(ours) == (2 if name == "several" else 3)


def test_repeated_responses_to_a_prompt_equal_the_greedy_one(
    folder: Path, tmp_path: Path, llama: Base
) -> None:
    """Check filters such as a vote, which get as many responses as `repeats` in the definition."""
    expected = reference_values(folder, llama, "written")
    found = evaluation(folder, tmp_path / "run", llama, "written")
    (*_, row) = [r for r in found.run("base", make_router("base")) if r["metric"] == "exact_match"]
    assert row["value"] == expected["exact_match,none"]
    table = read_table(Folder(tmp_path / "run"), "samples/own/base.parquet", SAMPLES).to_pylist()
    votes = [sample["filtered_resps"][0] for sample in expected["samples"]]
    assert [sample["prediction"] for sample in table] == votes
    assert found.total == len(DOCS)


def test_zero_shots_may_be_requested(folder: Path) -> None:
    group = {"name": "own", "source": "lm_eval", "lm_eval": ["few_shot"]}
    (spec,) = task_specs({**group, "include_path": str(folder), "num_fewshot": 0})
    assert lm_eval.load_task(spec).config.num_fewshot == 0


def test_the_metrics_of_the_paper_use_the_conditional_choices(
    folder: Path, tmp_path: Path, llama: Base
) -> None:
    """Check that requests for other metrics of the task do not interfere."""
    found = evaluation(folder, tmp_path / "run", llama, "mutual")
    found.run("base", make_router("base"))
    table = read_table(Folder(tmp_path / "run"), "samples/own/base.parquet", SAMPLES).to_pylist()
    for sample, doc in zip(table, DOCS, strict=True):
        means = []
        for choice in doc["a"]:
            context = llama.tokenizer(f"Question: {doc['q']}\nAnswer:")["input_ids"]
            whole = llama.tokenizer(f"Question: {doc['q']}\nAnswer: {choice}")["input_ids"]
            target = [*whole[len(context) :], llama.tokenizer.eos_token_id]
            score = plain_score(llama, context, target)
            means.append((score.loglikelihood + score.eos_loglikelihood) / (score.tokens + 1))
        metrics = dict(sample["metrics"])
        assert metrics["nll"] == pytest.approx(-means[doc["gold"]], abs=1e-4)
        assert metrics["acc_paper"] == float(means.index(max(means)) == doc["gold"])
        assert sample["prediction"] in doc["a"]
    assert len({round(dict(sample["metrics"])["nll"], 3) for sample in table}) > 3


def test_several_inputs_become_records_with_their_beginnings_as_choices(folder: Path) -> None:
    from harness.tasks.lm_eval_tasks import evaluation_table

    (data,) = prepare_all(specs(folder, "several"))
    rows = evaluation_table(data).to_pylist()
    assert rows[1]["choices"] == [
        "The goose is grey and the swan",
        "The goose is grey and the lake",
    ]
    assert [row["correct"] for row in rows] == [[0], [1], [0], [1]]
    assert rows[1]["targets"] == ["swims."]


def test_unreadable_tasks_are_named_before_preparation(folder: Path) -> None:
    """Check that a few records of every task are built before preparation."""
    path = folder / "utils.py"
    path.write_text(UTILS.replace('return doc["n"] % 2', 'return doc["gone"]'))
    problems = unreachable(specs(folder, "several"))
    assert "several" in problems
    assert "KeyError" in problems["several"]
    broken = yaml.safe_load((folder / "mutual.yaml").read_text())
    write(folder, "mutual", {**broken, "doc_to_target": "{{'maybe'}}"})
    assert "mutual" in unreachable(specs(folder, "mutual"))
    with pytest.raises(PhatgooseError, match="document 0"):
        prepare_all(specs(folder, "mutual"))
