"""Tasks of the BIG-Bench-Hard release (Suzgun et al., arXiv 2210.09261; MIT license).

BIG-bench has three of its tasks only as programs, so a suite reads them from this release:
`boolean_expressions`, `multistep_arithmetic_two` and `web_of_lies`. They are read from a folder
with `<task>.json` (a clone of the release, or its folder `bbh`), otherwise from the hub.

Prompts: style `paper` is the input followed by "\\nAnswer:", as PHATGOOSE's authors prompt; style
`bigbench` is "Q: ", the input and "\\nA:", as in the release's own prompts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.tasks.files import file_digest
from harness.tasks.records import Record, Split, check_record, named, split_of
from harness.tasks.sources import hub
from harness.tasks.sources.hub import HubData
from harness.tasks.sources.source import TaskRecords, no_tasks, options_of
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError

# Parquet, one configuration per task, all rows in the split test.
DATA_SET = "SaylorTwift/bbh"


@dataclass(frozen=True)
class Options:
    """Options for reading tasks.

    Attributes:
        choices: the answers to choose from; without choices the answer is generated.
        revision: revision of the data set on the hub.
    """

    choices: list[str] | None = None
    revision: str = ""


expand = no_tasks


def check(spec: TaskSpec) -> None:
    """Reject unknown options, and members that are not plain task names."""
    options_of(Options, spec)
    for member in spec.members:
        if not member.replace("_", "").isalnum():
            raise PhatgooseError(f"task {spec.name}: {member!r} is not a task of BIG-Bench-Hard")


def identity(spec: TaskSpec) -> Any:
    """Return the hash of each file, or the revision of the data set."""
    found = []
    for member in spec.members:
        path = _file(spec, member)
        if path is None:
            found.append(hub.identity(_data(spec, member), spec.folder))
        else:
            found.append(file_digest(path))
    return found


def missing(spec: TaskSpec) -> str | None:
    """Return which tasks are neither in a file nor on the hub."""
    problems = []
    for member in spec.members:
        problem = None
        if _file(spec, member) is None:
            problem = hub.missing(_data(spec, member), spec.folder)
        if problem:
            place = f"no {member}.json in {spec.folder}, and " if spec.folder else ""
            problems.append(f"{place}{problem}; folder= may name a clone of BIG-Bench-Hard")
    return "; ".join(problems) or None


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks."""
    for spec in specs:
        yield TaskRecords(spec, _records(spec))


def _data(spec: TaskSpec, member: str) -> HubData:
    return HubData(DATA_SET, config=member, revision=options_of(Options, spec).revision)


def _file(spec: TaskSpec, member: str) -> Path | None:
    """Return the release's file of a task, if the given folder has it."""
    if spec.folder is None:
        return None
    folder = Path(spec.folder).expanduser()
    places = [folder / f"{member}.json", folder / "bbh" / f"{member}.json"]
    return next((path for path in places if path.is_file()), None)


def _records(spec: TaskSpec) -> Iterator[tuple[Split, Record]]:
    choices = options_of(Options, spec).choices or []
    for member in spec.members:
        for where, example in _examples(spec, member):
            if not all(isinstance(example.get(key), str) for key in ("input", "target")):
                raise PhatgooseError(f"{where}: input or target is missing; it has {list(example)}")
            text, target = example["input"], example["target"].strip()
            prompt = f"{text}\nAnswer: " if spec.style == "paper" else f"Q: {text}\nA: "
            correct = [choices.index(target)] if target in choices else []
            record = Record(
                spec.name,
                "",
                prompt,
                [target],
                choices,
                correct,
                [float(choice == target) for choice in choices],
                text,
            )
            check_record(record, where)
            yield split_of(spec.name, text), named(record)


def _examples(spec: TaskSpec, member: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = _file(spec, member)
    if path is None:
        data = _data(spec, member)
        for number, row in enumerate(hub.rows(data, "test", spec.folder), start=1):
            yield f"data set {data}, row {number}", row
        return
    try:
        examples = json.loads(path.read_bytes())["examples"]
    except (ValueError, KeyError, TypeError) as error:
        raise PhatgooseError(f"{path} is not a file of BIG-Bench-Hard: {error!r}") from error
    for number, example in enumerate(examples, start=1):
        yield f"{path}, example {number}", example
