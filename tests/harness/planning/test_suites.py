"""Check that planning refuses the parts of a suite that a base cannot answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.check import check_values
from harness.config.schema import RunConfig
from harness.evaluation.requests import SuiteRequests
from harness.planning.suites import check_lengths, check_suite
from harness.tasks import TaskData, TaskSpec, prepare_all, task_specs
from harness.tasks.sources import lm_eval
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.tokenization import encode_pair
from tests.support.toy import make_plan, prepare_toys, toy_config

SWANS = TaskSpec("swans", ("swans",), split="all", limit=9)
SUMS = TaskSpec("sums", ("sums",), split="all", limit=5, max_new_tokens=4)
CUT = {"name": "held", "too_long": "cut"}
REFUSE = {"name": "held", "too_long": "refuse"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def only_our_definitions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lm_eval.tasks import TaskManager

    def manager(include_path: str | None) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval, "_manager", manager)
    yield
    lm_eval._load.cache_clear()


@pytest.fixture
def tasks(tmp_path: Path) -> list[TaskData]:
    return prepare_toys([SWANS, SUMS], tmp_path)


@pytest.fixture
def own_task(tmp_path: Path) -> Any:
    """Write a user's definition of a task over three documents; return its suite."""

    def write(**fields: Any) -> dict[str, Any]:
        data = tmp_path / "docs.jsonl"
        docs = [{"q": f"Is the {name} deep?", "say": name} for name in ("lake", "goose", "swan")]
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        task = {
            "task": "own",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "Question: {{q}}\nAnswer:",
            "doc_to_target": "{{say}}",
            "output_type": "generate_until",
            "metric_list": [{"metric": "exact_match"}],
            **fields,
        }
        (folder / "own.yaml").write_text(yaml.safe_dump(task))
        return {
            "name": "held",
            "source": "lm_eval",
            "lm_eval": ["own"],
            "include_path": str(folder),
        }

    return write


def test_a_suite_that_fits_is_accepted(base: Base, tasks: list[TaskData]) -> None:
    for suite in ({"name": "held"}, CUT, REFUSE):
        check(base, suite, tasks)


def check(base: Base, suite: dict[str, Any], tasks: list[TaskData]) -> None:
    """Run the plan's checks of a suite."""
    check_suite(base, suite, tasks)
    if suite.get("too_long") == "refuse":
        check_lengths(base, SuiteRequests(suite["name"], tasks))


def test_overlong_prompts_are_refused_if_requested(base: Base, tasks: list[TaskData]) -> None:
    prompts = {
        data.name: [
            len(encode_pair(base, row["input"], choice)[0])
            + (
                0
                if base.is_encoder_decoder
                else len(encode_pair(base, row["input"], choice)[1]) - 2
            )
            for row in rows(data)
            for choice in (row["choices"] or row["targets"])
        ]
        for data in tasks
    }
    longest = max(max(lengths) for lengths in prompts.values())
    base.model.config.n_positions = longest + 8
    check(base, REFUSE, tasks)
    base.model.config.n_positions = min(prompts["swans"]) - 1
    check_suite(base, CUT, tasks)
    with pytest.raises(PhatgooseError, match=r"suite.too_long=refuse: .*9 of held/swans") as caught:
        check(base, REFUSE, tasks)
    assert "\n" not in str(caught.value)
    base.model.config.n_positions = max(prompts["swans"]) - 1
    with pytest.raises(PhatgooseError, match=r"[1-8] of held/swans"):
        check(base, REFUSE, tasks[:1])


def rows(data: TaskData) -> list[dict[str, Any]]:
    from harness.tasks.lm_eval_tasks import evaluation_table

    found: list[dict[str, Any]] = evaluation_table(data).to_pylist()
    return found


def test_the_room_for_generated_tokens_counts(llama: Base, tasks: list[TaskData]) -> None:
    longest = max(len(encode_pair(llama, row["input"], "x")[0]) for row in rows(tasks[1]))
    llama.model.config.max_position_embeddings = longest + SUMS.max_new_tokens
    check(llama, REFUSE, tasks[1:])
    llama.model.config.max_position_embeddings -= 1
    with pytest.raises(PhatgooseError, match="of held/sums"):
        check(llama, REFUSE, tasks[1:])


def test_generating_more_than_the_context_of_the_base_is_refused(
    llama: Base, tasks: list[TaskData]
) -> None:
    llama.model.config.max_position_embeddings = SUMS.max_new_tokens
    with pytest.raises(
        PhatgooseError, match=r"suite held, task sums: max_new_tokens=4: .* reads 4"
    ):
        check_suite(llama, CUT, tasks)


def test_an_answer_longer_than_the_context_of_the_base_is_refused(
    base: Base, tasks: list[TaskData]
) -> None:
    longest = max(
        len(encode_pair(base, "", choice)[1]) - 1 for choice in rows(tasks[0])[0]["choices"]
    )
    base.model.config.n_positions = longest
    check_suite(base, CUT, tasks[:1])
    base.model.config.n_positions = longest - 1
    with pytest.raises(PhatgooseError, match=r"suite held, task swans: document .* tokens, and"):
        check_suite(base, CUT, tasks[:1])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams=4"),
        ({"repetition_penalty": 5.0}, "generation_kwargs.repetition_penalty=5.0"),
        ({"no_repeat_ngram_size": 2}, "generation_kwargs.no_repeat_ngram_size=2"),
        ({"max_gen_toks": 0}, "generation_kwargs.max_gen_toks=0"),
        ({"max_gen_toks": 600}, "max_new_tokens=600: .* reads 512"),
        ({"do_sample": True}, "generation_kwargs.do_sample=True"),
    ],
)
def test_unsupported_options_of_lm_eval_tasks_are_refused_while_planning(
    llama: Base, llama_folder: Path, tmp_path: Path, own_task: Any, options: Any, line: str
) -> None:
    """Check that this holds even if the documents were prepared before."""
    suite = own_task(generation_kwargs={"until": ["\n"], "do_sample": False})
    specs = task_specs(suite)
    prepared = prepare_all(specs)
    own_task(generation_kwargs={"until": ["\n"], "do_sample": False, **options})
    lm_eval._load.cache_clear()
    with pytest.raises(PhatgooseError, match=line):
        check_suite(llama, suite, prepared)
    config: RunConfig = toy_config(llama_folder, tmp_path / "run", suites=[suite])
    prepare_toys(config.pool_tasks(), tmp_path)
    with pytest.raises(PhatgooseError, match=line) as caught:
        make_plan(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_check_of_tasks_reports_refused_options(own_task: Any) -> None:
    (spec,) = task_specs(own_task(generation_kwargs={"until": ["\n"], "num_beams": 4}))
    assert "generation_kwargs.num_beams=4" in str(lm_eval.missing(spec))


def test_every_spelling_of_a_limit_and_every_stop_string_is_planned(
    llama: Base, own_task: Any
) -> None:
    for options in ({"max_new_tokens": 3}, {"max_tokens": 3}, {"until": [""]}, {"until": "x"}):
        suite = own_task(generation_kwargs=options)
        lm_eval._load.cache_clear()
        check_suite(llama, suite, prepare_all(task_specs(suite)))


def test_prompts_are_measured_with_their_shots(llama: Base, own_task: Any) -> None:
    suite = own_task(num_fewshot=2, generation_kwargs={"max_gen_toks": 4})
    specs = task_specs(suite)
    data = prepare_all(specs)
    longest = max(len(encode_pair(llama, row["input"], "x")[0]) for row in rows(data[0]))
    llama.model.config.max_position_embeddings = longest + 4
    with pytest.raises(PhatgooseError, match="3 of held/own"):
        check(llama, {**suite, "too_long": "refuse"}, data)


def test_the_truncation_setting_is_validated(llama_folder: Path, tmp_path: Path) -> None:
    config: RunConfig = toy_config(llama_folder, tmp_path / "run")
    for value in ("cut", "refuse"):
        config.suites[0]["too_long"] = value
        check_values(config)
    config.suites[0]["too_long"] = "cutt"
    with pytest.raises(
        PhatgooseError, match=r"suite.too_long=cutt: no such choice; did you mean cut"
    ):
        check_values(config)
    del config.suites[0]["too_long"]
    config.pool["too_long"] = "cut"
    with pytest.raises(PhatgooseError, match=r"pool.too_long: this is an evaluation option"):
        check_values(config)
