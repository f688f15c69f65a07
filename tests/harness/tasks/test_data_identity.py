"""Check that a changed local file is read again, however it is named, at equal size and time."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.tasks import folder_of, prepare_all, task_specs
from harness.tasks.files import file_digest, folder_digests
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.sources import lm_eval
from phatgoose.errors import PhatgooseError

UTILS = "def text(doc):\n    return 'Q: ' + doc['q']\n"


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))

    def manager(include_path: str | None, _: str) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval, "_make_manager", manager)
    yield
    lm_eval._load.cache_clear()


def write_docs(path: Path, count: int, gold: int) -> None:
    docs = [{"q": f"is it {i}?", "a": ["yes", "no"], "gold": gold} for i in range(count)]
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    write_docs(made / "docs.jsonl", 9, 0)
    (made / "utils.py").write_text(UTILS)
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(made / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_choice": "a",
        "doc_to_target": "gold",
    }
    (made / "own.yaml").write_text(yaml.safe_dump(task) + "doc_to_text: !function utils.text\n")
    return made


def group(folder: Path, **keys: Any) -> dict[str, Any]:
    return {
        "name": "own",
        "source": "lm_eval",
        "lm_eval": ["own"],
        "include_path": str(folder),
        **keys,
    }


def rows(folder: Path, **keys: Any) -> list[dict[str, Any]]:
    (data,) = prepare_all(task_specs(group(folder, **keys)))
    found: list[dict[str, Any]] = evaluation_table(data).to_pylist()
    return found


def test_an_edited_data_file_is_read_again(folder: Path) -> None:
    assert [row["correct"] for row in rows(folder)] == [[0]] * 9
    write_docs(folder / "docs.jsonl", 12, 1)
    assert [row["correct"] for row in rows(folder)] == [[1]] * 12


def test_an_edit_that_keeps_size_and_time_is_noticed(folder: Path) -> None:
    file = folder / "docs.jsonl"
    before = file.stat()
    assert rows(folder)[0]["correct"] == [0]
    write_docs(file, 9, 1)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert rows(folder)[0]["correct"] == [1]


def test_edited_code_beside_a_definition_is_run_again(folder: Path) -> None:
    assert rows(folder)[0]["input"] == "Q: is it 0?"
    (folder / "utils.py").write_text(UTILS.replace("Q: ", "Question: "))
    assert rows(folder)[0]["input"] == "Question: is it 0?"


OWN_DATASET = """
import json, pathlib, random, datasets

def make(**_):
    lines = (pathlib.Path(__file__).parents[1] / "elsewhere.csv").read_text().splitlines()
    docs = [{"q": line, "a": ["yes", "no"], "gold": 0} for line in lines]
    return {"test": datasets.Dataset.from_list(docs)}

def draw(**_):
    docs = [{"q": str(random.SystemRandom().random()), "a": ["yes", "no"], "gold": 0}]
    return {"test": datasets.Dataset.from_list(docs)}

def text(doc):
    return doc["q"]
"""


def write_own_dataset(folder: Path, function: str) -> None:
    (folder.parent / "elsewhere.csv").write_text("one\ntwo\n")
    (folder / "utils.py").write_text(OWN_DATASET)
    file = folder / "own.yaml"
    task = file.read_text().replace("dataset_path: json\n", "")
    file.write_text(task + f"custom_dataset: !function utils.{function}\n")


def test_a_file_read_by_custom_code_is_read_again(folder: Path) -> None:
    """Check a file outside all folders whose files are tracked automatically."""
    write_own_dataset(folder, "make")
    assert [row["input"] for row in rows(folder)] == ["one", "two"]
    (folder.parent / "elsewhere.csv").write_text("one\nTWO\n")
    assert [row["input"] for row in rows(folder)] == ["one", "TWO"]
    (folder.parent / "elsewhere.csv").write_text("one\ntwo\n")
    assert [row["input"] for row in rows(folder)] == ["one", "two"]


def test_custom_code_that_draws_documents_is_refused(folder: Path) -> None:
    write_own_dataset(folder, "draw")
    with pytest.raises(PhatgooseError, match="own code draws random documents: seed it"):
        rows(folder)


def test_an_edited_definition_is_read_again(folder: Path) -> None:
    rows(folder)
    file = folder / "own.yaml"
    file.write_text(file.read_text().replace("doc_to_choice: a", "doc_to_choice: ['x', 'y']"))
    assert rows(folder)[0]["choices"] == ["x", "y"]


@pytest.mark.parametrize("form", ["list", "pattern", "folder", "relative"])
def test_data_named_in_an_overlay_is_read_again(
    folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder / "data"
    data.mkdir()
    write_docs(data / "docs.jsonl", 3, 0)
    monkeypatch.chdir(folder)
    overlays: dict[str, dict[str, Any]] = {
        "list": {"dataset_kwargs": {"data_files": {"test": [str(data / "docs.jsonl")]}}},
        "pattern": {"dataset_kwargs": {"data_files": {"test": str(data / "*.jsonl")}}},
        "relative": {"dataset_kwargs": {"data_files": {"test": "data/docs.jsonl"}}},
        "folder": {
            "dataset_path": str(data),
            "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
        },
    }
    keys = {"overlay": {"own": overlays[form]}}
    assert len(rows(folder, **keys)) == 3
    write_docs(data / "docs.jsonl", 5, 1)
    assert [row["correct"] for row in rows(folder, **keys)] == [[1]] * 5


def test_unchanged_data_are_not_read_again(folder: Path) -> None:
    (spec,) = task_specs(group(folder))
    before = folder_of(spec)
    os.utime(folder / "docs.jsonl")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.py").write_text("")
    assert folder_of(spec) == before


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: {"source": "jsonl", "members": [str(p / "a.jsonl")]}, id="jsonl"),
        pytest.param(
            lambda p: {"source": "bbh", "members": ["web_of_lies"], "folder": str(p)}, id="bbh"
        ),
    ],
)
def test_other_sources_are_identified_by_content_too(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]]
) -> None:
    def write(word: str) -> None:
        line = json.dumps({"input": f"is it {word}?", "target": "yes"})
        (tmp_path / "a.jsonl").write_text(line + "\n")
        example = {"examples": [{"input": f"is it {word}?", "target": "Yes"}]}
        (tmp_path / "web_of_lies.json").write_text(json.dumps(example))

    write("one")
    (spec,) = task_specs(
        {"name": "own", "source": make(tmp_path)["source"], "tasks": {"t": make(tmp_path)}}
    )
    before = folder_of(spec)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.is_file()}
    write("two")
    for path, time in times.items():
        os.utime(path, ns=(time, time))
    assert folder_of(spec) != before


def test_the_digest_of_a_folder_covers_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_text("b")
    [[name, digest]] = folder_digests(tmp_path)
    assert name == "sub/a.txt"
    assert digest == file_digest(tmp_path / "sub" / "a.txt")
    assert digest.startswith("ca978112ca1bbdca")  # SHA-256 of "a"
    with pytest.raises(PhatgooseError, match="cannot read"):
        file_digest(tmp_path / "gone")
