"""Anything that lm-eval knows: its packaged tasks and groups, and a user's own YAML files.

A suite says `lm_eval: [bbh, arc_easy]`; groups and tags become their tasks. lm-eval's own task
object is what evaluates (its prompts, shots, filters and metrics); the records made here say which
documents it has, in its order, for the plan, the check of contamination, and the samples.

`overlay` replaces fields of packaged definitions, by task or pattern, so that they read local
files: {bbh_*: {dataset_path: json, dataset_kwargs: {data_files: ...}, dataset_name: null}}.
"""

import difflib
import fnmatch
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.tasks.generation_options import generation_options
from harness.tasks.records import Record, Split, check_record
from harness.tasks.sources import hub
from harness.tasks.sources.hub import HubData
from harness.tasks.sources.source import TaskRecords, options_of
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError

# What routed inference can answer.
_OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood")


@dataclass(frozen=True)
class Options:
    """How a task is loaded.

    Attributes:
        include_path: a folder with the user's own task definitions.
        num_fewshot: how many shots, instead of the definition's.
        overlay: fields that replace the definition's.
    """

    include_path: str | None = None
    num_fewshot: int | None = None
    overlay: dict[str, Any] | None = None


def check(spec: TaskSpec) -> None:
    """Refuse unknown options and more than one member."""
    options_of(Options, spec)
    if len(spec.members) != 1:
        raise PhatgooseError(f"task {spec.name}: its member must be one task of lm-eval")


def expand(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """One task per task of lm-eval that `lm_eval` names, itself or by a group or tag."""
    names = group.get("lm_eval")
    if not names:
        if group.get("tasks"):
            return {}
        raise PhatgooseError(f"{group['name']}: say which tasks of lm-eval, as suite=lm_eval:bbh")
    include_path = group.get("include_path")
    shared = {key: group[key] for key in ("include_path", "num_fewshot") if group.get(key)}
    tasks = {}
    for name in [names] if isinstance(names, str) else names:
        for leaf in _leaves(str(name), include_path):
            overlay: dict[str, Any] = {}
            for pattern, replaced in (group.get("overlay") or {}).items():
                if fnmatch.fnmatchcase(leaf, pattern):
                    overlay |= replaced
            opts = {**shared, **({"overlay": overlay} if overlay else {})}
            tasks[leaf] = {"members": [leaf], "load_opts": opts}
    return tasks


def identity(spec: TaskSpec) -> Any:
    """lm-eval's version, and the definition with what replaces it."""
    options = options_of(Options, spec)
    entry = _manager(options.include_path).task_index.get(spec.members[0])
    definition = json.dumps(getattr(entry, "cfg", None), default=str, sort_keys=True)
    return [importlib.metadata.version("lm_eval"), definition]


def missing(spec: TaskSpec) -> str | None:
    """Why its documents cannot be had. Local files are loaded to see that; the hub is asked."""
    options = options_of(Options, spec)
    entry = _manager(options.include_path).task_index.get(spec.members[0])
    fields = {**(getattr(entry, "cfg", None) or {}), **(options.overlay or {})}
    path = str(fields.get("dataset_path") or "")
    if "/" in path and not Path(path).exists() and not _datasets_cache(path).exists():
        # datasets itself would try again and again, for each task, where there is no network.
        problem = hub.missing(HubData(path, str(fields.get("dataset_name") or "")), None)
        return problem and f"{problem}; overlay= names local files"
    try:
        load_task(spec)
    except PhatgooseError as error:
        return str(error)
    return None


def _datasets_cache(path: str) -> Path:
    """Where datasets keeps what it has loaded of a data set."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """The documents of tasks, in lm-eval's order."""
    for spec in specs:
        task = load_task(spec)
        about = str(task.config.description or "").strip() or spec.members[0].replace("_", " ")
        yield TaskRecords(spec, _records(spec, task), description=about)


def load_task(spec: TaskSpec) -> Any:
    """lm-eval's task object.

    Raises:
        PhatgooseError: there is no such task, its data cannot be had, or routed inference cannot
            answer what it asks.
    """
    return _load(spec.members[0], json.dumps(dict(spec.load_opts), sort_keys=True))


@lru_cache(maxsize=512)
def _load(name: str, load_opts: str) -> Any:
    options = Options(**json.loads(load_opts))
    fields = {**(options.overlay or {}), "task": name}
    if options.num_fewshot is not None:
        fields["num_fewshot"] = options.num_fewshot
    manager = _manager(options.include_path)
    try:
        # Only a group, here of one, may change fields of its tasks.
        (task,) = manager.load([{"group": "one", "task": [fields]}])["tasks"].values()
    except Exception as error:  # whatever data sets, the network and task code raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PhatgooseError(
            f"task {name} of lm-eval cannot be loaded ({type(error).__name__}: {reason}); its data "
            "set is looked for on the hub and in the hub's cache; overlay= names local files"
        ) from error
    if task.OUTPUT_TYPE not in _OUTPUT_TYPES:
        raise PhatgooseError(
            f"task {name} of lm-eval asks for {task.OUTPUT_TYPE}, which routed inference does not "
            "offer: leave it out of the suite"
        )
    if task.OUTPUT_TYPE == "generate_until":
        generation_options(f"{name} of lm-eval", task.config.generation_kwargs)
    return task


@lru_cache(maxsize=4)
def _manager(include_path: str | None) -> Any:
    """Every definition there is; this takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _leaves(name: str, include_path: str | None) -> Iterator[str]:
    """The tasks that a name stands for; no data is loaded."""
    from lm_eval.tasks._index import Kind

    index = _manager(include_path).task_index
    entry = index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, index, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`"
        raise PhatgooseError(f"lm-eval has no task or group {name}: {hint}")
    if entry.kind is Kind.TAG:
        for member in sorted(entry.tags):
            yield from _leaves(member, include_path)
    elif entry.kind is Kind.GROUP:
        for member in (entry.cfg or {}).get("task", []):
            yield from _members(name, member, include_path)
    else:
        yield name


def _members(group: str, member: Any, include_path: str | None) -> Iterator[str]:
    """The tasks of one entry of a group, which may be a group that is written out."""
    if isinstance(member, str):
        yield from _leaves(member, include_path)
    elif isinstance(member, Mapping) and isinstance(member.get("task"), list):
        for inner in member["task"]:
            yield from _members(group, inner, include_path)
    else:
        raise PhatgooseError(
            f"group {group} of lm-eval changes its tasks ({member}): name the tasks you want"
        )


def _records(spec: TaskSpec, task: Any) -> Iterator[tuple[Split, Record]]:
    for number, doc in enumerate(task.eval_docs):
        record = _record(spec, task, number, doc)
        check_record(record, f"task {spec.name} of lm-eval, document {number}")
        yield "evaluation", record


def _record(spec: TaskSpec, task: Any, number: int, doc: Mapping[str, Any]) -> Record:
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices: list[str] = []
    correct: list[int] = []
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        right = target if isinstance(target, list) else [target]
        correct = [r if isinstance(r, int) else choices.index(str(r)) for r in right]
        if isinstance(prompt, int):  # several beginnings of one end
            prompt = choices[correct[0]]
        targets = [choices[i] for i in correct]
    else:
        targets = [str(t) for t in (target if isinstance(target, list) else [target])]
    text = " ".join(value for value in doc.values() if isinstance(value, str))
    # Documents are named by their number, which is lm-eval's order when they are sorted.
    return Record(spec.name, f"{number:08x}", str(prompt), targets, choices, correct, text=text)
