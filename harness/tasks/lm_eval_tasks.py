"""Build lm-eval tasks from records in code, without task registry, hub or cache."""

import copy
from typing import Any

import pyarrow as pa
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from harness.tasks import TaskData
from harness.tasks.sources.lm_eval import load_task
from harness.tasks.store import read_table
from phatgoose.errors import PhatgooseError


def make_task(data: TaskData, suite: str) -> ConfigurableTask:
    """Return the lm-eval task that evaluates `data` as its specification says.

    Multiple choice is scored by `acc` and `acc_norm`; any correct choice counts. Generation is
    greedy up to the end of the line and scored by `exact_match`: any accepted answer counts,
    case-sensitive, with surrounding whitespace stripped. Each document has the fields of its
    record.

    A task from lm-eval is returned with its own prompts, shots, filters and metrics.

    Raises:
        PhatgooseError: there is no document to evaluate on.
    """
    name = f"{suite}/{data.name}"
    if data.spec.source == "lm_eval":
        # A copy, since another suite may use the same task under a different name.
        task = copy.copy(load_task(data.spec))
        task._config = copy.copy(task.config)
        task.config.task = name
        return task
    config: dict[str, Any] = {
        "task": name,
        "test_split": "test",
        "num_fewshot": 0,
        # Without this line lm-eval would use all documents as candidates for shots.
        "fewshot_config": {"samples": []},
        "doc_to_text": "input",
        "target_delimiter": "",
        "metadata": {"version": 1, "suite": suite, "fingerprint": data.fingerprint},
    }
    if data.kind == "multiple_choice":
        config |= _multiple_choice()
    else:
        config |= _generation(data.spec.max_new_tokens)
    return _TableTask(evaluation_table(data), config)


def evaluation_table(data: TaskData) -> pa.Table:
    """Return the records that `data` is evaluated on, in the order in which lm-eval sees them."""
    # Documents are sorted by hash, so the first ones are a random sample of the source.
    limit = data.spec.limit
    table = read_table(data.evaluation, limit=limit)
    if data.spec.split == "all":
        table = pa.concat_tables([table, read_table(data.train, limit=limit)]).sort_by("document")
        table = table if limit is None else table.slice(0, limit)
    if not len(table):
        raise PhatgooseError(
            f"task {data.name} has no document to evaluate on. Add members, or set split: all."
        )
    return _equally_right(table)


def _equally_right(table: pa.Table) -> pa.Table:
    """Return the table with every choice marked correct whose text equals a correct one.

    Among equal choices a model always prefers the first, whichever one the data marks as correct.
    """
    rows = zip(table["choices"].to_pylist(), table["correct"].to_pylist(), strict=True)
    correct = [
        correct if len({*choices}) == len(choices) else _all_like(choices, correct)
        for choices, correct in rows
    ]
    place = table.schema.get_field_index("correct")
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(correct, field.type))


def _all_like(choices: list[str], correct: list[int]) -> list[int]:
    """Return the indices of all choices whose text equals a correct one."""
    texts = {choices[place] for place in correct}
    return [place for place, choice in enumerate(choices) if choice in texts]


class _TableTask(ConfigurableTask):
    """An lm-eval task over a table in memory."""

    def __init__(self, table: pa.Table, config: dict[str, Any]) -> None:
        self._table = table
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None, **_: Any) -> None:
        """Use the table as the data set; lm-eval would load one by name."""
        self.dataset = {"test": Dataset.from_dict(self._table.to_pydict())}


def _multiple_choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        # A list for every document, so that lm-eval accepts any of the correct choices.
        "doc_to_target": "correct",
        "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
    }


def _generation(max_new_tokens: int) -> dict[str, Any]:
    # lm-eval's regex filter strips its match, here the whole answer.
    strip = {"function": "regex", "regex_pattern": r"(?s).+", "fallback": ""}
    return {
        "output_type": "generate_until",
        "doc_to_target": "targets",
        "metric_list": [_mean_of("exact_match")],
        "filter_list": [{"name": "none", "filter": [strip, {"function": "take_first"}]}],
        "generation_kwargs": {
            "until": ["\n"],
            "max_gen_toks": max_new_tokens,
            "do_sample": False,
        },
    }


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}
