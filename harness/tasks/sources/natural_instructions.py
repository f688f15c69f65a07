"""Read Natural Instructions v2 (Wang et al., arXiv 2204.07705) from a clone of its repository.

`folder` is the clone, with `tasks/task*.json`. Members are file names without `.json`. A pool
without named tasks has one expert per category or per task (`by`), for the tasks in one language.
The prompt is zero-shot: the definition, then the input, then "Output:".
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.tasks.files import file_digest
from harness.tasks.records import Record, Split, check_record, named, split_of
from harness.tasks.sources.source import TaskRecords, options_of
from harness.tasks.spec import TaskSpec, one_of
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from phatgoose.files import replacing


@dataclass(frozen=True)
class Options:
    """Options for reading tasks.

    Attributes:
        max_examples: maximum number of examples to keep of each member, the first ones.
    """

    max_examples: int = 500_000


def check(spec: TaskSpec) -> None:
    """Reject unknown options, and members that are not plain file names."""
    options_of(Options, spec)
    for member in spec.members:
        if not re.fullmatch(r"[\w-]+", member):
            raise PhatgooseError(f"task {spec.name}: {member!r} is not a task name")


def expand(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return one task per category or per file of the clone."""
    if group.get("tasks") and "by" not in group:
        return {}
    by, language = group.get("by", "category"), str(group.get("language", "English"))
    one_of(by, ("category", "task"), f"{group['name']}: by")
    tasks: dict[str, dict[str, Any]] = {}
    for member, about in sorted(_index(_clone(str(group["name"]), group.get("folder"))).items()):
        if about["languages"] != [language]:
            continue
        for key in [member] if by == "task" else about["categories"]:
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_")
            tasks.setdefault(name, {"members": []})["members"].append(member)
    if not tasks:
        raise PhatgooseError(f"{group['name']}: the clone has no task in {language}")
    return tasks


def identity(spec: TaskSpec) -> Any:
    """Return the hash of each member's file."""
    paths = [_file(spec, member) for member in spec.members]
    lacking = [path for path in paths if not path.exists()]
    if lacking:
        raise PhatgooseError(f"cannot find {lacking[0]}")
    return [file_digest(path) for path in paths]


def missing(spec: TaskSpec) -> str | None:
    """Return which members' files are missing."""
    lacking = [str(p) for m in spec.members if not (p := _file(spec, m)).exists()]
    return f"cannot find {', '.join(lacking)}" if lacking else None


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks, file by file."""
    for spec in specs:
        yield TaskRecords(spec, _records(spec), description=spec.name.replace("_", " "))


def _records(spec: TaskSpec) -> Iterator[tuple[Split, Record]]:
    most = options_of(Options, spec).max_examples
    for member in spec.members:
        path = _file(spec, member)
        task = _load(path)
        definition = " ".join(task["Definition"]).strip()
        for number, instance in enumerate(task["Instances"][:most], start=1):
            where = f"{path}, instance {number}"
            text, targets = instance.get("input"), instance.get("output")
            if not isinstance(text, str) or not isinstance(targets, list):
                raise PhatgooseError(
                    f"{where}: input or output is missing; it has {list(instance)}"
                )
            prompt = f"{definition}\n\nInput: {text.strip()}\nOutput: "
            record = Record(
                spec.name,
                "",
                prompt,
                [str(target).strip() for target in targets],
                [],
                [],
                text=text,
            )
            check_record(record, where)
            yield split_of(spec.name, prompt), named(record)


def _clone(name: str, folder: Any) -> Path:
    if not folder:
        raise PhatgooseError(
            f"{name}: no folder is given. Name a clone of allenai/natural-instructions: "
            "pool.folder=/data/natural-instructions."
        )
    tasks = Path(str(folder)).expanduser() / "tasks"
    if not tasks.is_dir():
        raise PhatgooseError(f"{name}: {folder} is not a clone of natural-instructions: no {tasks}")
    return tasks


def _file(spec: TaskSpec, member: str) -> Path:
    return _clone(f"task {spec.name}", spec.folder) / f"{member}.json"


@lru_cache(maxsize=8)
def _index(tasks: Path) -> dict[str, dict[str, Any]]:
    """Return categories and languages by task. Cached, since the files are gigabytes."""
    note = cache_dir() / "natural_instructions.json"
    known: dict[str, Any] = json.loads(note.read_bytes()) if note.exists() else {}
    index = {}
    for path in sorted(tasks.glob("task*.json")):
        status = path.stat()
        key = f"{path}:{status.st_size}:{status.st_mtime_ns}"
        if key not in known:
            task = _load(path)
            languages = {*task.get("Input_language", []), *task.get("Output_language", [])}
            known[key] = {"categories": task["Categories"], "languages": sorted(languages)}
        index[path.stem] = known[key]
    note.parent.mkdir(parents=True, exist_ok=True)
    with replacing(note) as file:
        file.write_text(json.dumps(known))
    return index


def _load(path: Path) -> dict[str, Any]:
    try:
        task: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PhatgooseError(f"{path} cannot be read as JSON: {error}") from error
    lacking = [k for k in ("Definition", "Categories", "Instances") if k not in task]
    if lacking:
        raise PhatgooseError(
            f"{path} has no {', '.join(lacking)}. Use a clone of Natural Instructions v2."
        )
    return task
