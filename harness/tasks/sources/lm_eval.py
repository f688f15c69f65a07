"""Anything that lm-eval knows: its packaged tasks and groups, and a user's own YAML files.

A suite says `lm_eval: [bbh, arc_easy]`; groups and tags become their tasks. lm-eval's own task
object is what evaluates (its prompts, shots, filters and metrics); the records made here say which
documents it has, in its order, for the plan, the check of contamination, and the samples.

`overlay` replaces fields of packaged definitions, by task or pattern, so that they read local
files: {bbh_*: {dataset_path: json, dataset_kwargs: {data_files: ...}, dataset_name: null}}.
"""

import contextlib
import fnmatch
import glob
import hashlib
import importlib.metadata
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.tasks.files import file_digest, folder_digests
from harness.tasks.generation_options import generation_options
from harness.tasks.records import Record, Split, check_record
from harness.tasks.sources import hub
from harness.tasks.sources.hub import HubData
from harness.tasks.sources.source import TaskRecords, options_of
from harness.tasks.spec import TaskSpec
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError, did_you_mean, reason_of

# What belongs to a definition, beside its YAML file.
_CODE = ("*.py", "*.yaml", "*.yml", "*.jinja", "*.jinja2", "*.txt")
# So many documents of a task are looked at to know whether it can be evaluated.
_CHECKED = 8
# The place of local data in what a definition takes from here.
_LOCAL_DATA = 3
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
    shared = {
        key: group[key] for key in ("include_path", "num_fewshot") if group.get(key) is not None
    }
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
    """lm-eval's version, the definition, and the content of every file that it takes from here.

    Those are the code beside the definition or in `include_path`, and local data. A function that
    makes the data set may read anything, so its documents are made, and count themselves.
    """
    found = _definition(spec)
    if _fields(spec).get("custom_dataset"):
        found.append(_documents_digest(spec, json.dumps(found)))
    return found


def _fields(spec: TaskSpec) -> dict[str, Any]:
    """The fields of a task's definition, those of the overlay in place of its own."""
    options = options_of(Options, spec)
    entry = _manager(options.include_path).task_index.get(spec.members[0])
    return {**(getattr(entry, "cfg", None) or {}), **(options.overlay or {})}


def _documents_digest(spec: TaskSpec, determined_by: str) -> str:
    """Make a task's documents, not taking those made before, and return their hash."""
    load_opts = json.dumps(dict(spec.load_opts), sort_keys=True)
    task = _load.__wrapped__(spec.members[0], load_opts, determined_by)
    documents = json.dumps(list(task.eval_docs), default=str)
    return hashlib.sha256(documents.encode()).hexdigest()


def _definition(spec: TaskSpec) -> list[Any]:
    """Return lm-eval's version, the definition, the code with it, and local data."""
    options = options_of(Options, spec)
    entry = _manager(options.include_path).task_index.get(spec.members[0])
    definition = getattr(entry, "cfg", None) or {}
    fields = {**definition, **(options.overlay or {})}
    yaml_path = getattr(entry, "yaml_path", None)
    code = [folder_digests(Path(yaml_path).parent, _CODE)] if yaml_path else []
    if options.include_path is not None:
        code.append(folder_digests(Path(options.include_path), _CODE))
    return [
        importlib.metadata.version("lm_eval"),
        json.dumps(definition, default=str, sort_keys=True),
        code,
        _local_data(fields.get("dataset_path"), fields.get("dataset_kwargs")),
    ]


def _local_data(dataset_path: Any, dataset_kwargs: Any) -> list[Any]:
    """The content of all files and folders here that a data set's definition names."""
    root = Path(str(dataset_path or "")).expanduser()
    found: list[Any] = []
    if dataset_path and root.is_dir():
        found.append(folder_digests(root))
    elif dataset_path and root.is_file():
        found.append(file_digest(root))
    kwargs = dataset_kwargs if isinstance(dataset_kwargs, Mapping) else {}
    named = filter(None, _strings([kwargs.get("data_files"), kwargs.get("data_dir")]))
    for text in (text.removeprefix("file://") for text in named):
        for start in (Path.cwd(), root):
            # Of an absolute path, `start` plays no part.
            for match in sorted(glob.glob(str(start / text), recursive=True)):  # noqa: PTH207
                path = Path(match)
                found.append(file_digest(path) if path.is_file() else folder_digests(path))
    return found


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def missing(spec: TaskSpec) -> str | None:
    """Why its documents cannot be had. Local files are loaded to see that; the hub is asked."""
    fields = _fields(spec)
    path = str(fields.get("dataset_path") or "")
    if "/" in path and not Path(path).exists() and not _datasets_cache(path).exists():
        # datasets itself would try again and again, for each task, where there is no network.
        problem = hub.missing(HubData(path, str(fields.get("dataset_name") or "")), None)
        return problem and f"{problem}; overlay= names local files"
    try:
        task = load_task(spec)
        for _ in itertools.islice(_records(spec, task), _CHECKED):
            pass
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
    # The identity, so that what was changed meanwhile is read again.
    determined_by = json.dumps(identity(spec))
    return _load(spec.members[0], json.dumps(dict(spec.load_opts), sort_keys=True), determined_by)


@lru_cache(maxsize=512)
def _load(name: str, load_opts: str, determined_by: str) -> Any:
    options = Options(**json.loads(load_opts))
    fields = {**(options.overlay or {}), "task": name}
    if options.num_fewshot is not None:
        fields["num_fewshot"] = options.num_fewshot
    manager = _manager(options.include_path)
    entry = manager.task_index.get(name)
    kwargs = fields.get("dataset_kwargs", (getattr(entry, "cfg", None) or {}).get("dataset_kwargs"))
    if json.loads(determined_by)[_LOCAL_DATA]:
        # datasets' own cache takes files of the same size and time for the same.
        cache = cache_dir() / "datasets" / hashlib.sha256(determined_by.encode()).hexdigest()[:16]
        fields["dataset_kwargs"] = {**(kwargs or {}), "cache_dir": str(cache)}
    try:
        with lm_eval_seeds():
            # Only a group, here of one, may change fields of its tasks.
            (task,) = manager.load([{"group": "one", "task": [fields]}])["tasks"].values()
    except Exception as error:  # whatever data sets, the network and task code raise
        raise PhatgooseError(
            f"task {name} of lm-eval cannot be loaded ({type(error).__name__}: "
            f"{reason_of(error)}); its data set is looked for on the hub and in the hub's cache; "
            "overlay= names local files"
        ) from error
    if task.OUTPUT_TYPE not in _OUTPUT_TYPES:
        raise PhatgooseError(
            f"task {name} of lm-eval asks for {task.OUTPUT_TYPE}, which routed inference does not "
            "offer: leave it out of the suite"
        )
    if task.OUTPUT_TYPE == "generate_until":
        generation_options(f"{name} of lm-eval", task.config.generation_kwargs)
    return _with_fixed_documents(task)


def _with_fixed_documents(task: Any) -> Any:
    """The task with the documents that it has now: some draw them again whenever they are asked."""
    documents = task.task_docs if hasattr(task, "task_docs") else task.eval_docs
    kind = type(task)
    task.__class__ = type(kind.__name__, (kind,), {"eval_docs": property(lambda _: documents)})
    return task


def _manager(include_path: str | None) -> Any:
    """Every definition there is; this takes some seconds the first time."""
    own = folder_digests(Path(include_path), _CODE) if include_path else []
    return _make_manager(include_path, json.dumps(own))


@lru_cache(maxsize=4)
def _make_manager(include_path: str | None, determined_by: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _leaves(name: str, include_path: str | None) -> Iterator[str]:
    """The tasks that a name stands for; no data is loaded."""
    from lm_eval.tasks._index import Kind

    index = _manager(include_path).task_index
    entry = index.get(name)
    if entry is None:
        hint = did_you_mean(name, index) or "see `lm-eval ls tasks`"
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


@contextlib.contextmanager
def lm_eval_seeds() -> Iterator[None]:
    """Seed all generators as `lm_eval.simple_evaluate` does; put them back afterwards.

    Tasks draw when they are loaded and when their requests are built.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED  # slow to import

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def check_documents(spec: TaskSpec, task: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise PhatgooseError if the task's first documents are not those that were stored."""
    with lm_eval_seeds():
        found = [asdict(r) for _, r in itertools.islice(_records(spec, task), len(rows))]
    for number, (row, again) in enumerate(zip(rows, found, strict=False)):
        if any(row[key] != again[key] for key in ("input", "targets", "choices", "correct")):
            raise PhatgooseError(
                f"task {spec.name} of lm-eval: document {number} differs from the one that was "
                "stored when the data was prepared, so its numbers could not be compared. Its "
                "definition draws without a seed (seed it there), or its own code reads a file "
                "that changed (remove the task's folder from the cache)."
            )
    if len(found) < len(rows):
        raise PhatgooseError(
            f"task {spec.name} of lm-eval: it has {len(found)} documents, and {len(rows)} were "
            "stored when the data was prepared. Remove its folder from the cache, and run again."
        )


def _records(spec: TaskSpec, task: Any) -> Iterator[tuple[Split, Record]]:
    for number, doc in enumerate(task.eval_docs):
        where = f"task {spec.name} of lm-eval, document {number}"
        try:
            record = _record(spec, task, number, doc)
        except Exception as error:  # whatever templates and the task's own code raise
            raise PhatgooseError(
                f"{where}: it cannot be read ({type(error).__name__}: {reason_of(error)}). Fix "
                "the task's definition, or leave the task out of the suite."
            ) from error
        check_record(record, where)
        yield "evaluation", record


def _record(spec: TaskSpec, task: Any, number: int, doc: Mapping[str, Any]) -> Record:
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices: list[str] = []
    correct: list[int] = []
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        # With several inputs, the choices are beginnings, the text says which is right, and the
        # target is the one end that follows each.
        given = prompt if task.multiple_input else target
        given = given if isinstance(given, list) else [given]
        correct = [r if isinstance(r, int) else choices.index(str(r)) for r in given]
        targets = [str(target)] if task.multiple_input else [choices[i] for i in correct]
        prompt = "" if task.multiple_input else prompt
    else:
        targets = [str(t) for t in (target if isinstance(target, list) else [target])]
    text = "\n".join(value for value in doc.values() if isinstance(value, str))
    # Documents are named by their number, which is lm-eval's order when they are sorted.
    return Record(spec.name, f"{number:08x}", str(prompt), targets, choices, correct, text=text)
