"""The tasks of the BIG-Bench-Hard release (Suzgun et al., arXiv 2210.09261; MIT licence).

Three of them are programs in BIG-bench, so that a suite needs this release:
`boolean_expressions`, `multistep_arithmetic_two` and `web_of_lies`. They are read from a folder
with `<task>.json` (a clone of the release, or its folder `bbh`), else from the hub.

Prompts: style `paper` is the input, then "\\nAnswer:", as PHATGOOSE's authors have it; style
`bigbench` is "Q: ", the input, "\\nA:", as the release's own prompts.
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
    """How tasks are read.

    Attributes:
        choices: the answers to choose from; without them the answer is generated.
        revision: of the hub's data set.
    """

    choices: list[str] | None = None
    revision: str = ""


expand = no_tasks


def check(spec: TaskSpec) -> None:
    """Refuse unknown options, and members that could be other paths."""
    options_of(Options, spec)
    for member in spec.members:
        if not member.replace("_", "").isalnum():
            raise PhatgooseError(f"task {spec.name}: {member!r} is no task of BIG-Bench-Hard")


def identity(spec: TaskSpec) -> Any:
    """The hash of each file, or the data set's revision."""
    found = []
    for member in spec.members:
        path = _file(spec, member)
        if path is None:
            found.append(hub.identity(_data(spec, member), spec.folder))
        else:
            found.append(file_digest(path))
    return found


def missing(spec: TaskSpec) -> str | None:
    """Which tasks are in no file, nor on the hub."""
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
    """The release's file of a task in the given folder."""
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
                raise PhatgooseError(f"{where}: it has no input and target, only {list(example)}")
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
        raise PhatgooseError(f"{path} is no file of BIG-Bench-Hard: {error!r}") from error
    for number, example in enumerate(examples, start=1):
        yield f"{path}, example {number}", example
