"""Build the requests of a suite once, with lm-eval's own seeds. Every router gets the same.

lm-eval draws shots at random, and some tasks draw documents or choices. Here the build of each task
starts from the seeds of `lm_eval.simple_evaluate`, so a task's requests depend neither on the other
tasks of the suite nor on earlier builds. Requests that still differ between two builds are an
error, see `SuiteRequests.build` and `SuiteRequests.check`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.defaults import DEFAULT_OTHER_SEED

from harness import run_folder
from harness.evaluation.documents import Documents
from harness.evaluation.lm import Asked, by_kind, quiet, requests_of
from harness.evaluation.shards import Kind
from harness.source_code import code_of, digest
from harness.storage import Folder
from harness.tasks import TaskData, describe, folder_of
from harness.tasks.lm_eval_tasks import make_task
from harness.tasks.sources.lm_eval import check_documents, lm_eval_seeds
from phatgoose.errors import PhatgooseError, reason_of

_KEPT_DOCUMENTS = 2000


@dataclass(frozen=True)
class TaskRequests:
    """The requests of one task.

    Attributes:
        data: the task.
        task: lm-eval's task.
        documents: the documents it is evaluated on.
        instances: lm-eval's requests, in its order.
        made_from: a hash of the definition, the data and the code that determine them.
        fingerprint: a hash of the requests and the correct answers.
    """

    data: TaskData
    task: Any
    documents: Documents
    instances: list[Instance]
    made_from: str
    fingerprint: str

    @property
    def targets(self) -> list[str]:
        """Each document's correct answer as it follows the prompt."""
        delimiter = self.task.config.target_delimiter
        return [delimiter + row["targets"][0] for row in self.documents.rows]

    def asked(self, name: str) -> dict[Kind, list[Asked]]:
        """Return what is asked of actors, by kind. `name` is what errors call the task."""
        return {
            kind: requests_of(kind, instances, self.targets)
            for kind, instances in by_kind(name, self.instances).items()
        }


class SuiteRequests:
    """The requests of a suite, built task by task when they are needed.

    Args:
        suite: its name.
        tasks: the data of its tasks.
        kept: about how many documents to keep the requests of.

    Attributes:
        data: the data of each task, by `<suite>/<task>`.
        tasks: the requests of each task, by `<suite>/<task>`. Reading one raises PhatgooseError if
            it cannot be built, or if two builds of it differ.
    """

    def __init__(self, suite: str, tasks: Sequence[TaskData], kept: int = _KEPT_DOCUMENTS) -> None:
        self.suite, self.data = suite, {f"{suite}/{data.name}": data for data in tasks}
        self._tasks = _Tasks(suite, self.data, kept)
        self.tasks: Mapping[str, TaskRequests] = self._tasks

    def check(self, folder: Folder) -> None:
        """Compare the requests with those of earlier calls of the run, then record them.

        Raises:
            PhatgooseError: the requests of a task differ, and what determines them does not.
        """
        name = run_folder.REQUESTS_FILE
        noted = run_folder.read_json(folder, name) if folder.exists(name) else {}
        now = {task: dict(self.note(task)) for task in self.tasks}
        for task, entry in now.items():
            before = noted.get(task)
            if not isinstance(before, dict) or before.get("made_from") != entry["made_from"]:
                continue  # nothing comparable was recorded
            if before.get("hash") != entry["hash"]:
                raise _differs(task, f"from those of an earlier call ({folder}/{name})")
        if noted != {**noted, **now}:
            run_folder.write_json(folder, name, {**noted, **now})

    @cached_property
    def descriptions(self) -> dict[str, str]:
        """Return each task's description, by task."""
        return {name: describe(data) for name, data in self.data.items()}

    def note(self, task: str) -> Mapping[str, str]:
        """Return hashes of what determines a task's requests, and of the requests."""
        return self._tasks.note(task)


class _Tasks(Mapping[str, TaskRequests]):
    """Builds a task's requests when it is read; keeps few, because a suite may have a million."""

    def __init__(self, suite: str, data: Mapping[str, TaskData], kept: int) -> None:
        self._suite, self._data, self._most = suite, data, kept
        self._notes: dict[str, dict[str, str]] = {}
        self._kept: dict[str, TaskRequests] = {}

    def __getitem__(self, name: str) -> TaskRequests:
        if name not in self._kept:
            task = _build(self._data[name], self._suite)
            note = {"made_from": task.made_from, "hash": task.fingerprint}
            if self._notes.setdefault(name, note) != note:
                raise _differs(name, "between two builds with the same seeds")
            self._kept[name] = task
            while len(self._kept) > 1 and self._documents() > self._most:
                del self._kept[next(iter(self._kept))]
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def note(self, name: str) -> Mapping[str, str]:
        """Return hashes of what determines a task's requests, and of the requests."""
        if name not in self._notes:
            self[name]
        return self._notes[name]

    def _documents(self) -> int:
        return sum(len(task.documents.rows) for task in self._kept.values())


def _build(data: TaskData, suite: str) -> TaskRequests:
    task, documents = make_task(data, suite), Documents.of(data)
    where = f"{suite}/{data.name}"
    is_foreign = data.spec.source == "lm_eval"
    if is_foreign:
        check_documents(data.spec, task, documents.rows)
    instances = _instances(task, len(documents.rows), where)
    asked = _as_json(instances)
    # Tasks over this project's tables draw nothing.
    if is_foreign and _as_json(_instances(task, len(documents.rows), where)) != asked:
        raise _differs(where, "between two builds with the same seeds")
    answers = [[row["targets"], row["correct"]] for row in documents.rows]
    determining = [
        {**asdict(data.spec), "folder": None},
        folder_of(data.spec).name,
        data.fingerprint,
        digest(code_of([__name__])),
    ]
    return TaskRequests(
        data, task, documents, instances, _hash(determining), _hash([asked, answers])
    )


def _instances(task: Any, documents: int, where: str) -> list[Instance]:
    """Return the requests of the first `documents` documents, built with lm-eval's seeds."""
    with lm_eval_seeds(), quiet():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            task.build_all_requests(samples=list(range(documents)), rank=0, world_size=1)
        except Exception as error:  # a task's own code may raise anything
            raise PhatgooseError(
                f"task {where}: lm-eval cannot build its requests ({type(error).__name__}: "
                f"{reason_of(error)}). Fix its definition, or leave it out of the suite."
            ) from error
    instances: list[Instance] = task.instances
    return instances


def _as_json(instances: Sequence[Instance]) -> str:
    return json.dumps([[one.request_type, one.args] for one in instances], default=str)


def _differs(task: str, how: str) -> PhatgooseError:
    return PhatgooseError(
        f"task {task}: its requests differ {how}, because its definition draws without a seed. "
        "Seed it there, or leave the task out of the suite."
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
