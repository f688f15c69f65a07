import json
from pathlib import Path
from typing import Any

import pytest

from harness.tasks import prepare_all, task_specs
from harness.tasks.store import read_records
from phatgoose.errors import PhatgooseError
from tests.support.half_written import half_written


def write_task(clone: Path, name: str, **changes: Any) -> Path:
    task = {
        "Definition": ["Say the opposite."],
        "Categories": ["Word Semantics"],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instances": [{"id": str(i), "input": f"hot {i}", "output": ["cold"]} for i in range(10)],
        **changes,
    }
    path = clone / "tasks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(task))
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "natural-instructions"
    write_task(folder, "task001_opposites")
    write_task(folder, "task002_likes", Instances=[{"input": "big", "output": ["huge", "large"]}])
    write_task(folder, "task003_poems", Categories=["Poem Generation"])
    write_task(folder, "task004_gegenteil", Input_language=["German"])
    return folder


def group(clone: Path, **keys: Any) -> dict[str, Any]:
    pool = {"name": "ni", "source": "natural_instructions", "by": "category"}
    return {**pool, "folder": str(clone), **keys}


def test_experts_are_made_per_category_or_per_task(clone: Path) -> None:
    specs = {spec.name: spec.members for spec in task_specs(group(clone))}
    assert specs == {
        "Word_Semantics": ("task001_opposites", "task002_likes"),
        "Poem_Generation": ("task003_poems",),
    }
    by_task = [spec.name for spec in task_specs(group(clone, by="task"))]
    assert by_task == ["task001_opposites", "task002_likes", "task003_poems"]


def test_prompts_and_answers_are_built(clone: Path) -> None:
    words, _ = prepare_all(task_specs(group(clone)))
    records = read_records(words.train) + read_records(words.evaluation)
    assert len(records) == 11
    (big,) = [record for record in records if record.text == "big"]
    assert big.input == "Say the opposite.\n\nInput: big\nOutput: "
    assert big.targets == ["huge", "large"]


def test_the_clone_is_read_once(clone: Path, cache: Path) -> None:
    from harness.tasks.sources import natural_instructions

    first = task_specs(group(clone))
    natural_instructions._index.cache_clear()
    for path in (clone / "tasks").iterdir():
        status = path.stat()
        path.write_bytes(b" " * status.st_size)  # not JSON, but of the same name, size and time
        import os

        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert task_specs(group(clone)) == first
    natural_instructions._index.cache_clear()


def test_an_index_is_written_whole_or_not_at_all(clone: Path, cache: Path) -> None:
    with half_written(), pytest.raises(OSError, match="no space"):
        task_specs(group(clone))
    assert list(cache.iterdir()) == []
    assert len(task_specs(group(clone))) == 2


@pytest.mark.parametrize(
    ("instance", "reason"),
    [
        ({"input": "x"}, r"task001_opposites\.json, instance 1: input or output is missing"),
        (
            {"input": "x", "output": [""]},
            r"task001_opposites\.json, instance 1: the target is empt",
        ),
    ],
)
def test_broken_files_are_named(clone: Path, instance: dict[str, Any], reason: str) -> None:
    write_task(clone, "task001_opposites", Instances=[instance])
    with pytest.raises(PhatgooseError, match=reason):
        prepare_all(task_specs(group(clone)))


def test_a_folder_that_is_not_a_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match=r"is not a clone of natural-instructions"):
        task_specs(group(tmp_path))
    with pytest.raises(PhatgooseError, match=r"pool\.folder=/data/natural-instructions"):
        task_specs({**group(tmp_path), "folder": None})
