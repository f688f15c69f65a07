"""Check that every task of the paper's BIG-bench suites has a loader, a prompt and a metric."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness.conf
from harness.tasks import TaskSpec, prepare_all, prepare_here, task_specs, write_all
from harness.tasks.lm_eval_tasks import make_task
from harness.tasks.sources import bigbench
from harness.tasks.store import read_records
from tests.support.toy import write_archive

GENERATED = {
    "multistep_arithmetic_two": 8,
    "object_counting": 8,
    "word_sorting": 128,
    "conlang_translation": 64,
    "linguistics_puzzles": 128,
    "operators": 4,
    "repeat_copy_logic": 64,
}


def definition(generated: bool) -> dict[str, Any]:
    answer = {"target": ["two", "2"]} if generated else {"target_scores": {"yes": 1, "no": 0}}
    return {"examples": [{"input": f"ask {i}", **answer} for i in range(10)]}


def suite(name: str, folder: Path) -> list[TaskSpec]:
    path = Path(harness.conf.__path__[0]) / "suite" / f"{name}.yaml"
    specs = task_specs(yaml.safe_load(path.read_text()))
    return [replace(spec, folder=str(folder)) for spec in specs]


@pytest.mark.parametrize(("name", "count"), [("bbh", 22), ("bbl", 17)])
def test_every_task_has_a_loader_a_prompt_and_a_metric(
    tmp_path: Path, name: str, count: int
) -> None:
    specs = suite(name, tmp_path)
    assert len(specs) == count
    members = {}
    for spec in specs:
        for member in spec.members:
            made = definition(spec.name in GENERATED)
            if spec.source == "bbh":
                target = spec.load_opts.get("choices", ["7"])[0]
                examples = [{"input": f"ask {i}", "target": target} for i in range(10)]
                (tmp_path / f"{member}.json").write_text(json.dumps({"examples": examples}))
            else:
                members[member.replace("*", "part")] = made
    archive = write_archive(tmp_path / "archive.tar.gz", members)

    def make(wanted: list[TaskSpec]) -> None:
        write_all(
            bigbench.read_archive(archive, [spec for spec in wanted if spec.source == "bigbench"])
        )
        prepare_here([spec for spec in wanted if spec.source != "bigbench"])

    for data in prepare_all(specs, make):
        records = read_records(data.train) + read_records(data.evaluation)
        assert len(records) == 10
        assert all(record.input.endswith("\nAnswer: ") for record in records)
        assert (data.kind == "generation") == (data.name in GENERATED)
        assert data.spec.max_new_tokens == GENERATED.get(data.name, 16)
        assert data.spec.metric == (
            "rouge_l" if data.name == "conlang_translation" else "exact_match"
        )
        assert make_task(data, name).config.metric_list
