import json
from pathlib import Path
from typing import Any

import pytest

from harness.tasks import TaskSpec, prepare
from harness.tasks.records import Record
from harness.tasks.sources.bbh import DATA_SET
from harness.tasks.store import read_records
from phatgoose.errors import PhatgooseError
from tests.support.hub_copies import write_copy

EXAMPLES = [
    {"input": f"not {'not ' * i}True is", "target": "False" if i % 2 == 0 else "True"}
    for i in range(20)
]
TRUTH = {"choices": ["True", "False"]}


def write_release(folder: Path, examples: list[Any], task: str = "truth") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.json").write_text(json.dumps({"canary": "c", "examples": examples}))


def records(folder: Path, **fields: Any) -> list[Record]:
    data = prepare(TaskSpec("logic", ("truth",), "bbh", folder=str(folder), **fields))
    found = read_records(data.train) + read_records(data.evaluation)
    return sorted(found, key=lambda record: len(record.text))


def test_the_style_of_the_paper_gives_prompts_with_choices(tmp_path: Path) -> None:
    write_release(tmp_path / "bbh", EXAMPLES)  # as in a clone of the release
    first, second, *_ = records(tmp_path, style="paper", load_opts=TRUTH)
    assert first.input == "not True is\nAnswer: "
    assert (first.choices, first.correct, first.targets) == (["True", "False"], [1], ["False"])
    assert (second.grades, second.text) == ([1.0, 0.0], "not not True is")


def test_the_style_of_the_release_gives_generation_prompts(tmp_path: Path) -> None:
    write_release(tmp_path, EXAMPLES)
    first, *_ = found = records(tmp_path)
    assert (first.input, first.choices) == ("Q: not True is\nA: ", [])
    assert len(found) == 20


def test_the_hub_copy_gives_the_same_records(tmp_path: Path) -> None:
    write_release(tmp_path / "a", EXAMPLES)
    write_copy(tmp_path / "b", DATA_SET, {"test": EXAMPLES}, config="truth")
    write_copy(tmp_path / "b", DATA_SET, {"test": EXAMPLES[:1]}, config="other")
    assert records(tmp_path / "a") == records(tmp_path / "b")


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        (
            [{"input": "x"}],
            r"truth\.json, example 1: input or target is missing; it has \['input'\]",
        ),
        (
            [{"input": "x", "target": "no"}],
            r"truth\.json, example 1: none of the choices is correct",
        ),
        (
            [{"input": "x", "target": " "}],
            r"truth\.json, example 1: none of the choices is correct",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, examples: list[Any], reason: str) -> None:
    write_release(tmp_path, examples)
    with pytest.raises(PhatgooseError, match=reason):
        records(tmp_path, load_opts=TRUTH)
    (tmp_path / "truth.json").write_text("[]")
    with pytest.raises(PhatgooseError, match="not a file of BIG-Bench-Hard"):
        records(tmp_path)


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"no truth\.json in .*SaylorTwift/bbh truth.*folder="):
        records(tmp_path)
    with pytest.raises(PhatgooseError, match="is not a task of BIG-Bench-Hard"):
        prepare_with_member("../truth", tmp_path)


def prepare_with_member(member: str, folder: Path) -> None:
    from harness.tasks import task_specs

    task = {"members": [member], "source": "bbh", "folder": str(folder)}
    task_specs({"name": "s", "tasks": {"t": task}})
