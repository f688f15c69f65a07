"""Check that requests are built once per suite, and do not depend on when and where."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from harness import run_folder
from harness.evaluation.requests import SuiteRequests
from harness.storage import Folder
from harness.tasks import prepare_all, task_specs
from harness.tasks.sources import lm_eval
from phatgoose.errors import PhatgooseError

DOCS: list[dict[str, Any]] = [
    {"q": f"Is it {i}?", "a": ["yes", "no"], "gold": i % 2} for i in range(12)
]
UTILS = """
import random

DRAWN = random.Random()

def shuffled(dataset):
    order = list(range(len(dataset)))
    random.shuffle(order)
    return dataset.select(order)

def text(doc):
    return f"{doc['q']} {SUFFIX}"

SUFFIX = "A:"
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        lm_eval, "_manager", lambda path: TaskManager(include_path=path, include_defaults=False)
    )
    yield
    lm_eval._load.cache_clear()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Write task definitions over a file: with shots, and with documents in a random order."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (folder / "utils.py").write_text(UTILS)
    files = {split: str(folder / "docs.jsonl") for split in ("train", "test")}
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "training_split": "train",
        "output_type": "multiple_choice",
        "doc_to_choice": "a",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
        "num_fewshot": 2,
    }
    for name, lines in (
        ("plain", "doc_to_text: '{{q}}'\n"),
        ("mixed", "doc_to_text: !function utils.text\nprocess_docs: !function utils.shuffled\n"),
    ):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared}) + lines)
    return folder


def build(folder: Path, *names: str, kept: int = 100, **keys: Any) -> SuiteRequests:
    group = {"name": "own", "source": "lm_eval", "lm_eval": list(names), **keys}
    specs = task_specs({**group, "include_path": str(folder)})
    requests = SuiteRequests("own", prepare_all(specs), kept)
    assert all(requests.tasks.values())
    return requests


def prompts(requests: SuiteRequests, task: str) -> list[str]:
    return [instance.args[0] for instance in requests.tasks[f"own/{task}"].instances]


def test_a_build_does_not_depend_on_earlier_draws_and_builds(tasks: Path) -> None:
    first = build(tasks, "plain", "mixed")
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    lm_eval._load.cache_clear()
    again = build(tasks, "mixed", "plain")
    for task in ("plain", "mixed"):
        assert prompts(first, task) == prompts(again, task)
        name = f"own/{task}"
        assert first.tasks[name].fingerprint == again.tasks[name].fingerprint
    assert any("Is it 3?" in prompt.split("\n")[0] for prompt in prompts(first, "plain"))
    assert len({prompt.split("\n")[0] for prompt in prompts(first, "plain")}) > 3  # shots differ
    documents = [prompt.split("\n")[-1] for prompt in prompts(first, "mixed")]
    assert documents != sorted(documents)


def test_random_generators_are_restored(tasks: Path) -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = [random.Random(7).random(), np.random.RandomState(7).rand()]
    build(tasks, "mixed")
    assert [random.random(), np.random.rand()] == expected
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


def test_another_process_builds_the_same_requests(tasks: Path, tmp_path: Path) -> None:
    """Check a process with another hash seed."""
    ours = build(tasks, "mixed", "plain")
    script = (
        "import sys, tests.harness.evaluation.test_requests as t\n"
        "from pathlib import Path\n"
        "from lm_eval.tasks import TaskManager\n"
        "t.lm_eval._manager = lambda p: TaskManager(include_path=p, include_defaults=False)\n"
        "built = t.build(Path(sys.argv[1]), 'plain', 'mixed')\n"
        "print([built.tasks[f'own/{n}'].fingerprint for n in ('plain', 'mixed')])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tasks)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "PHATGOOSE_CACHE": str(tmp_path / "other")},
    ).stdout.splitlines()[-1]
    assert found == str([ours.tasks[f"own/{n}"].fingerprint for n in ("plain", "mixed")])


def test_two_suites_may_contain_the_same_task(tasks: Path) -> None:
    specs = task_specs(
        {"name": "a", "source": "lm_eval", "lm_eval": ["plain"], "include_path": str(tasks)}
    )
    data = prepare_all(specs)
    one, two = SuiteRequests("one", data), SuiteRequests("two", data)
    assert {i.task_name for i in one.tasks["one/plain"].instances} == {"one/plain"}
    assert {i.task_name for i in two.tasks["two/plain"].instances} == {"two/plain"}
    assert one.tasks["one/plain"].task.config.task == "one/plain"


def test_large_tasks_are_built_again_when_they_are_needed(tasks: Path) -> None:
    requests = build(tasks, "plain", "mixed", kept=len(DOCS))
    mixed = requests.tasks["own/mixed"]
    assert requests.tasks["own/mixed"] is mixed
    plain = requests.tasks["own/plain"]
    again = requests.tasks["own/mixed"]
    assert again is not mixed
    assert [one.args for one in again.instances] == [one.args for one in mixed.instances]
    assert requests.tasks["own/mixed"] is again
    requests.data["own/plain"] = dataclasses.replace(plain.data, fingerprint="changed meanwhile")
    with pytest.raises(PhatgooseError, match="own/plain: its requests differ between two builds"):
        assert requests.tasks["own/plain"]


def test_a_definition_with_unseeded_randomness_is_refused(tasks: Path) -> None:
    utils = UTILS.replace("{SUFFIX}", "{DRAWN.random()}")
    (tasks / "utils.py").write_text(utils)
    with pytest.raises(PhatgooseError, match=r"mixed.*draws without a seed"):
        build(tasks, "mixed")


def test_documents_drawn_without_a_seed_are_refused(tasks: Path) -> None:
    """Check documents loaded once in this process, while the files come from another load."""
    (tasks / "utils.py").write_text(UTILS.replace("random.shuffle", "DRAWN.shuffle"))
    group = {"name": "own", "source": "lm_eval", "lm_eval": ["mixed"], "include_path": str(tasks)}
    data = prepare_all(task_specs(group))
    lm_eval._load.cache_clear()
    with pytest.raises(PhatgooseError, match=r"mixed of lm-eval: document \d+ differs"):
        assert SuiteRequests("own", data).tasks["own/mixed"]


def test_requests_must_not_change_between_calls(tasks: Path, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    requests = build(tasks, "plain", "mixed")
    requests.check(run)
    before = run.read(run_folder.REQUESTS_FILE)
    requests.check(run)
    assert run.read(run_folder.REQUESTS_FILE) == before
    noted = json.loads(before)
    noted["own/plain"]["hash"] = "0" * 16
    run_folder.write_json(run, run_folder.REQUESTS_FILE, noted)
    with pytest.raises(PhatgooseError, match="own/plain: its requests differ from those of an"):
        requests.check(run)


def test_other_documents_give_other_requests(tasks: Path, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    build(tasks, "plain", limit=4).check(run)
    build(tasks, "plain", limit=6).check(run)  # requests them
    (tasks / "utils.py").write_text(UTILS.replace('"A:"', '"Answer:"'))
    build(tasks, "mixed").check(run)
    (tasks / "utils.py").write_text(UTILS)
    build(tasks, "mixed").check(run)


def test_the_fingerprint_covers_the_prompts_and_the_answers(tasks: Path) -> None:
    def fingerprint(task: str = "plain", **keys: Any) -> str:
        return build(tasks, task, **keys).tasks[f"own/{task}"].fingerprint

    first = fingerprint()
    assert fingerprint(num_fewshot=1) != first  # the records are equal
    flipped = [{**doc, "gold": 1 - doc["gold"]} for doc in DOCS]
    (tasks / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in flipped))
    assert fingerprint() != first
