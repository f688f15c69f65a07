"""Where examples come from: a task specification in, parquet files of records out."""

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from harness.tasks import bigbench, jsonl
from harness.tasks.records import (
    Kind,
    Record,
    Split,
    fingerprint_of,
    kind_of,
    read_metadata,
    write_records,
)
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError

# Raise it whenever the same specification gives other records than before.
_VERSION = 2
SOURCES = ("bigbench", "jsonl", "registry")
# Keys of a pool or suite that are not the defaults of its tasks.
_NOT_OF_TASKS = ("name", "tasks", "general")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class TaskSpec:
    """One task of a pool or a suite, as its YAML file describes it.

    Attributes:
        name: the task's name; letters, digits, `_`, `.` and `-`.
        members: what it is made of: tasks of BIG-bench, or the user's own files.
        source: `bigbench`; `jsonl` for files of JSON lines (`harness.tasks.jsonl`); `registry` for
            an expert of that name that the registry has already, which needs no members.
        adapter: a folder with a LoRA adapter saved by PEFT, which becomes the task's expert. With
            members its gates are trained on them; without it has no gates, and no profile.
        description: what the task is about, for the routers that read it; BIG-bench's own, or made
            of the task's name and some inputs, if it is empty.
        style: how prompts are written, see `bigbench.STYLES`.
        load_opts: changes to the members as they are read, see `bigbench.LOAD_OPTS`.
        split: what to evaluate on: the `evaluation` fifth, or `all`, for a task that no expert of
            the pool was trained on.
        limit: how many documents to evaluate on at most; none means all of them.
        max_new_tokens: how many tokens to generate at most.
    """

    name: str
    members: tuple[str, ...]
    source: str = "bigbench"
    adapter: str | None = None
    description: str = ""
    style: str = "bigbench"
    load_opts: Mapping[str, bool] = field(default_factory=dict)
    split: Literal["evaluation", "all"] = "evaluation"
    limit: int | None = None
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        """Raise PhatgooseError for a value that cannot be meant."""
        where = f"task {self.name}"
        if not _NAME.fullmatch(self.name):
            raise PhatgooseError(
                f"{self.name!r} cannot be a task's name: use letters, digits, _, . and -"
            )
        _one_of(self.source, SOURCES, f"{where}: source")
        needs_members = self.source != "registry" and self.adapter is None
        if not isinstance(self.members, tuple) or (needs_members and not self.members):
            raise PhatgooseError(f"{where}: members must be a list of BIG-bench tasks or of files")
        if self.source == "registry" and (self.members or self.adapter):
            raise PhatgooseError(
                f"{where}: an expert of the registry is taken as it is: leave out members and "
                "adapter, or choose another source"
            )
        _one_of(self.style, bigbench.STYLES, f"{where}: style")
        _one_of(self.split, ("evaluation", "all"), f"{where}: split")
        for option, on in self.load_opts.items():
            _one_of(option, bigbench.LOAD_OPTS, f"{where}: load_opts")
            if not isinstance(on, bool):
                raise PhatgooseError(f"{where}: {option} must be true or false, not {on!r}")
        for key, value in (("limit", self.limit), ("max_new_tokens", self.max_new_tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise PhatgooseError(f"{where}: {key} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class TaskData:
    """The records of a task on disk.

    Attributes:
        spec: what they were made from.
        train, evaluation: the parquet files of the two splits (`records.read_records`).
        fingerprint: SHA-256 of the records of both splits.
        counts: how many records each split has; none where an expert comes without data.
        kind: how the task is evaluated.
        description: what the task is about, as far as that is known.
    """

    spec: TaskSpec
    train: Path
    evaluation: Path
    fingerprint: str
    counts: dict[Split, int]
    kind: Kind
    description: str = ""

    @property
    def name(self) -> str:
        """The task's name."""
        return self.spec.name


def task_specs(group: Mapping[str, Any]) -> list[TaskSpec]:
    """The tasks of a pool or suite, in the order of its YAML file.

    Args:
        group: the YAML file as plain dictionaries and lists: `name`, `tasks` (task name -> fields
            of TaskSpec), and any other field of TaskSpec as the default for all its tasks. A pool
            may name its `general` expert, which some routers treat apart.

    Raises:
        PhatgooseError: an unknown key or value; the message gives the near names.
    """
    defaults = {key: value for key, value in group.items() if key not in _NOT_OF_TASKS}
    allowed = tuple(f.name for f in fields(TaskSpec) if f.name != "name")
    specs = []
    for name, own in group["tasks"].items():
        values = {**defaults, **(own or {})}
        for key in values:
            _one_of(key, allowed, f"{group['name']}: task {name}: key")
        members = values.pop("members", ())
        if isinstance(members, list):
            members = tuple(members)
        specs.append(TaskSpec(name=str(name), members=members, **values))
    return specs


def prepare(spec: TaskSpec, *, archive: Path | None = None) -> TaskData:
    """`prepare_all` for a single task."""
    return prepare_all([spec], archive=archive)[0]


def prepare_all(specs: Sequence[TaskSpec], *, archive: Path | None = None) -> list[TaskData]:
    """Make the parquet files of each task, or find those made before, in the order given.

    The first time costs one pass over BIG-bench's archive (about ten seconds) for all tasks
    together; later the archive is not even opened.

    Args:
        specs: the tasks.
        archive: BIG-bench's source distribution; fetched into the cache if not given.

    Raises:
        PhatgooseError: the archive, a member of a task, or one of its examples is faulty.
    """
    missing = [spec for spec in specs if not _evaluation_path(spec).exists()]
    new = [spec for spec in missing if spec.source == "bigbench" and spec.members]
    if new:
        print(f"reading {len(new)} tasks from BIG-bench ...", file=sys.stderr, flush=True)
        members = [member for spec in new for member in spec.members]
        sources = bigbench.read_members(archive or bigbench.fetch_archive(), members)
        for spec in new:
            definitions = [
                bigbench.parse_member(member, sources[member], spec.load_opts)
                for member in spec.members
            ]
            # BIG-bench's mark, by which text can be kept out of training corpora, stays with it.
            canary = "\n".join(sorted({str(d.get("canary", "")) for d in definitions}))
            splits = bigbench.make_records(spec.name, definitions, spec.style)
            about = "; ".join(str(d["description"]) for d in definitions if d.get("description"))
            origin = {"source": "BIG-bench 1.0.0", "canary": canary, "description": about}
            _write(spec, splits, origin)
    for spec in missing:
        if not spec.members:
            _write(spec, {"train": [], "evaluation": []}, {"source": "none"})
        elif spec.source == "jsonl":
            _write(spec, jsonl.read_splits(spec.name, spec.members), {"source": "jsonl"})
    return [_find(spec) for spec in specs]


def describe(data: TaskData) -> str:
    """What a task is about; its name, if nothing else is known."""
    return data.description or data.name.replace("_", " ")


def _write(spec: TaskSpec, splits: dict[Split, list[Record]], origin: dict[str, str]) -> None:
    metadata = {
        **origin,
        "members": ", ".join(spec.members),
        "kind": (
            kind_of(spec.name, splits["train"] + splits["evaluation"])
            if spec.members
            else "generation"
        ),
        "fingerprint": fingerprint_of(splits),
        "counts": json.dumps({split: len(records) for split, records in splits.items()}),
    }
    # The evaluation file comes last: where it exists, the task is complete.
    path = _evaluation_path(spec)
    write_records(path.with_name("train.parquet"), splits["train"], metadata)
    write_records(path, splits["evaluation"], metadata)


def _find(spec: TaskSpec) -> TaskData:
    path = _evaluation_path(spec)
    metadata = read_metadata(path)
    return TaskData(
        spec=spec,
        train=path.with_name("train.parquet"),
        evaluation=path,
        fingerprint=metadata["fingerprint"],
        counts=json.loads(metadata["counts"]),
        kind=metadata["kind"],  # type: ignore[arg-type]
        description=spec.description or metadata.get("description", ""),
    )


def _evaluation_path(spec: TaskSpec) -> Path:
    """Derived data lies under the hash of all that determines it."""
    options = sorted(option for option, on in spec.load_opts.items() if on)
    content: Any = bigbench.SHA256
    if spec.source == "jsonl":
        content = jsonl.fingerprint_of_files(spec.name, spec.members)
    made_from = [_VERSION, content, spec.name, spec.members, spec.style, options]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    return cache_dir() / "tasks" / key / "evaluation.parquet"


def _one_of(value: str, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(allowed)}"
        raise PhatgooseError(f"{where}: there is no {value!r}; {hint}")
