"""Tasks of pools and suites: from the entries of a YAML file to parquet files of records."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from harness.source_code import code_of, digest
from harness.tasks.records import Kind, Split
from harness.tasks.sources import GROUP_KEYS, SOURCES, TaskRecords
from harness.tasks.spec import TaskSpec, one_of
from harness.tasks.store import is_written, read_task, write_task
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError

__all__ = [
    "TaskData",
    "TaskSpec",
    "describe",
    "folder_of",
    "list_names",
    "prepare",
    "prepare_all",
    "prepare_here",
    "task_specs",
    "unreachable",
    "write_all",
]

# Keys that describe the pool or suite itself. All other keys are defaults for its tasks.
_OF_THE_GROUP = ("name", "tasks", "lists", "only", "general", "too_long")
# Up to this many unavailable tasks are each reported with the reason.
_FEW = 4
_LISTS = Path(__file__).parent / "lists"
_FIELDS = tuple(f.name for f in fields(TaskSpec) if f.name != "name")


@dataclass(frozen=True)
class TaskData:
    """The records of a task on disk.

    Attributes:
        spec: the specification they were made from.
        train, evaluation: folders with the parquet files of the two splits, see
            `harness.tasks.store`.
        fingerprint: SHA-256 of the records of both splits.
        counts: number of records in each split; zero for an expert without data.
        kind: how the task is evaluated.
        characters: mean length of a training example.
        description: what the task is about, if known.
        origin: where the records come from: source, revision, canary.
    """

    spec: TaskSpec
    train: Path
    evaluation: Path
    fingerprint: str
    counts: dict[Split, int]
    kind: Kind
    characters: float = 0.0
    description: str = ""
    origin: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name


def task_specs(group: Mapping[str, Any]) -> list[TaskSpec]:
    """Return the tasks of a pool or suite, in order.

    Args:
        group: its YAML file as plain dictionaries and lists:
            `name`;
            `lists`: names of task lists in `harness/tasks/lists`;
            `tasks`: task name -> fields of TaskSpec; adds tasks or overrides those of a list;
            `only`: names of the tasks to keep; all if omitted;
            `general`: for a pool, the expert that some routers treat separately;
            `too_long`: for a suite, what to do with prompts that do not fit the base;
            keys that a source expands to tasks, such as `files`, see `GROUP_KEYS`;
            any other field of TaskSpec, as the default for all its tasks.

    Raises:
        PhatgooseError: a key or value is unknown; the message suggests similar names.
    """
    where, source = group["name"], str(group.get("source", "bigbench"))
    one_of(source, SOURCES, f"{where}: source")
    made_of = GROUP_KEYS.get(source, ())
    defaults = {k: v for k, v in group.items() if k not in (*_OF_THE_GROUP, *made_of)}
    entries: dict[str, dict[str, Any]] = {}
    for name in group.get("lists") or ():
        entries |= _read_list(str(name))
    entries |= SOURCES[source].expand(group)
    for name, own in (group.get("tasks") or {}).items():
        entries[str(name)] = {**entries.get(str(name), {}), **(own or {})}
    only = group.get("only")
    for name in only or ():
        one_of(name, entries, f"{where}: only")
    if not entries:
        raise PhatgooseError(
            f"{where}: there are no tasks. Name some: `tasks: {{name: {{members: [...]}}}}`."
        )
    chosen = entries if only is None else {name: entries[name] for name in only}
    return [_spec(where, name, {**defaults, **own}) for name, own in chosen.items()]


def list_names() -> list[str]:
    """Return the names of the available task lists."""
    return sorted(path.stem for path in _LISTS.glob("*.yaml") if path.stem != "hub_ids")


def prepare(spec: TaskSpec) -> TaskData:
    """Prepare a single task, see `prepare_all`."""
    return prepare_all([spec])[0]


def prepare_here(specs: Sequence[TaskSpec], beat: Callable[[], None] = lambda: None) -> None:
    """Write the files of tasks in this process, one task after another.

    Args:
        specs: the tasks; none of them has files yet.
        beat: called after each task, as a heartbeat.
    """
    by_source: dict[str, list[TaskSpec]] = {}
    for spec in specs:
        by_source.setdefault(spec.source, []).append(spec)
    for source, wanted in by_source.items():
        write_all(SOURCES[source].read(wanted), beat)


def write_all(tasks: Iterable[TaskRecords], beat: Callable[[], None] = lambda: None) -> None:
    """Write the tasks that a source reads, and call `beat` after each."""
    for task in tasks:
        spec = task.spec
        origin = {"source": spec.source, "members": ", ".join(spec.members), **task.origin}
        write_task(
            folder_of(spec), spec.name, task.records, description=task.description, origin=origin
        )
        beat()


def prepare_all(
    specs: Sequence[TaskSpec], make: Callable[[list[TaskSpec]], None] = prepare_here
) -> list[TaskData]:
    """Prepare the files of each task, or find existing ones; keep the given order.

    Args:
        specs: the tasks.
        make: writes the files of the tasks that have none.

    Raises:
        PhatgooseError: a source is unavailable (nothing is written then), or an example is
            invalid.
    """
    lacking = unreachable(specs)
    if lacking:
        raise PhatgooseError(_cannot_be_had(specs, lacking))
    new = [spec for spec in specs if spec.has_data and not is_written(folder_of(spec))]
    if new:
        make(list({folder_of(spec): spec for spec in new}.values()))
    return [_find(spec) for spec in specs]


def unreachable(specs: Sequence[TaskSpec]) -> dict[str, str]:
    """Return what is missing for each unavailable task without files, by the task's name."""
    found = {}
    for spec in specs:
        if not spec.has_data:
            continue
        try:
            if is_written(folder_of(spec)):
                continue
            problem = SOURCES[spec.source].missing(spec)
        except PhatgooseError as error:  # the identity of the records cannot be determined
            problem = SOURCES[spec.source].missing(spec) or str(error)
        if problem is not None:
            found[spec.name] = f"task {spec.name}: {problem}"
    return found


def _cannot_be_had(specs: Sequence[TaskSpec], lacking: Mapping[str, str]) -> str:
    """Describe unavailable tasks: each with the reason if few, else all members by name."""
    summary = f"{len(lacking)} of {len(specs)} tasks are unavailable: "
    reasons = list(lacking.values())
    if len(reasons) <= _FEW:
        return summary + "; ".join(reasons)
    members = dict.fromkeys(m for spec in specs if spec.name in lacking for m in spec.members)
    return (
        f"{summary}{reasons[0]}; missing: {', '.join(members)}. Run `python -m harness.tasks "
        "check` with the same pool and suite to see the reason for each task."
    )


def describe(data: TaskData) -> str:
    """Return what a task is about, or its name if there is no description."""
    return data.description or data.name.replace("_", " ")


def folder_of(spec: TaskSpec) -> Path:
    """Return the folder of a task's files, named by the hash of all that determines them."""
    made_from = [
        _source_code(spec.source),
        spec.source,
        SOURCES[spec.source].identity(spec),
        spec.name,
        spec.members,
        spec.style,
        {name: value for name, value in spec.load_opts.items() if value not in (False, None)},
    ]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "tasks" / key


@cache
def _source_code(source: str) -> str:
    """Return the hash of the code that reads this source and writes its records."""
    return digest(code_of([f"{__name__}.sources.{source}", f"{__name__}.store"]))


def _spec(where: str, name: str, values: Mapping[str, Any]) -> TaskSpec:
    for key in values:
        one_of(key, _FIELDS, f"{where}: task {name}: key")
    members = values.get("members") or ()
    if isinstance(members, list):
        members = tuple(members)
    spec = TaskSpec(name=name, **{**values, "members": members})
    one_of(spec.source, SOURCES, f"task {name}: source")
    if not spec.has_data and spec.adapter is None and spec.source != "registry":
        raise PhatgooseError(f"task {name}: members are missing. List what the task is made of.")
    if spec.has_data or spec.source == "registry":
        SOURCES[spec.source].check(spec)
    return spec


@cache
def _read_list(name: str) -> dict[str, dict[str, Any]]:
    one_of(name, list_names(), "lists")
    entries = yaml.safe_load((_LISTS / f"{name}.yaml").read_text())
    defaults = entries.pop("_defaults", {})
    return {task: {**defaults, **own} for task, own in entries.items()}


def _find(spec: TaskSpec) -> TaskData:
    if not spec.has_data:
        nowhere = Path("/nonexistent")
        empty = hashlib.sha256(b"evaluation\ntrain\n").hexdigest()
        counts: dict[Split, int] = {"train": 0, "evaluation": 0}
        return TaskData(
            spec, nowhere, nowhere, empty, counts, "generation", description=spec.description
        )
    folder = folder_of(spec)
    if not is_written(folder):
        raise PhatgooseError(
            f"task {spec.name}: the source of its records changed while they were written. Run "
            "again. If this happens again, the task's own code draws random documents: seed it."
        )
    file = asdict(read_task(folder))
    file["description"] = spec.description or file["description"]
    return TaskData(spec, folder / "train", folder / "evaluation", **file)
