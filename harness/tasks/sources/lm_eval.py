"""Any task that lm-eval knows: its packaged tasks and groups, and a user's own YAML files.

A suite names them, as in `lm_eval: [bbh, arc_easy]`; groups and tags are expanded to their tasks.
lm-eval's own task object evaluates (its prompts, shots, filters and metrics). The records made here
list its documents in its order, for the plan, the overlap check and the samples.

`overlay` replaces fields of packaged definitions, by task or pattern, for example to read local
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

# Files that may belong to a definition.
_CODE = ("*.py", "*.yaml", "*.yml", "*.jinja", "*.jinja2", "*.txt")
# Number of documents read to check that a task can be evaluated.
_CHECKED = 8
# Index of the local data in the result of `_definition`.
_LOCAL_DATA = 3
# Output types that routed inference supports.
_OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood")


@dataclass(frozen=True)
class Options:
    """Options for loading a task.

    Attributes:
        include_path: a folder with the user's own task definitions.
        num_fewshot: number of shots, instead of the definition's.
        overlay: fields that replace the definition's.
    """

    include_path: str | None = None
    num_fewshot: int | None = None
    overlay: dict[str, Any] | None = None


def check(spec: TaskSpec) -> None:
    """Reject unknown options and more than one member."""
    options_of(Options, spec)
    if len(spec.members) != 1:
        raise PhatgooseError(f"task {spec.name}: members must be exactly one lm-eval task")


def expand(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return one task per lm-eval task that `lm_eval` names, directly or by a group or tag."""
    names = group.get("lm_eval")
    if not names:
        if group.get("tasks"):
            return {}
        raise PhatgooseError(
            f"{group['name']}: no tasks are given. Name lm-eval tasks, such as suite=lm_eval:bbh."
        )
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
    """Return lm-eval's version, the definition, and the hashes of all local files it uses.

    Those are the code beside the definition or in `include_path`, and local data. A function that
    builds the data set may read anything, so the hash of its documents is included.
    """
    found = _definition(spec)
    if _fields(spec).get("custom_dataset"):
        found.append(_documents_digest(spec, json.dumps(found)))
    return found


def _fields(spec: TaskSpec) -> dict[str, Any]:
    """Return the fields of a task's definition, overridden by the overlay."""
    options = options_of(Options, spec)
    entry = _manager(options.include_path).task_index.get(spec.members[0])
    return {**(getattr(entry, "cfg", None) or {}), **(options.overlay or {})}


def _documents_digest(spec: TaskSpec, determined_by: str) -> str:
    """Build a task's documents without using the cache, and return their hash."""
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
    """Return the hashes of all local files and folders that a data set's definition names."""
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
            # `start` has no effect on an absolute path.
            for match in sorted(glob.glob(str(start / text), recursive=True)):  # noqa: PTH207
                path = Path(match)
                found.append(file_digest(path) if path.is_file() else folder_digests(path))
    return found


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def missing(spec: TaskSpec) -> str | None:
    """Return why the documents are unavailable. Loads local files, and asks the hub."""
    fields = _fields(spec)
    path = str(fields.get("dataset_path") or "")
    if "/" in path and not Path(path).exists() and not _datasets_cache(path).exists():
        # Without a network, datasets itself would retry for each task.
        problem = hub.missing(HubData(path, str(fields.get("dataset_name") or "")), None)
        return problem and f"{problem}; use overlay= to name local files"
    try:
        task = load_task(spec)
        for _ in itertools.islice(_records(spec, task), _CHECKED):
            pass
    except PhatgooseError as error:
        return str(error)
    return None


def _datasets_cache(path: str) -> Path:
    """Return the folder of a data set in datasets' cache."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read the documents of tasks, in lm-eval's order."""
    for spec in specs:
        task = load_task(spec)
        about = str(task.config.description or "").strip() or spec.members[0].replace("_", " ")
        yield TaskRecords(spec, _records(spec, task), description=about)


def load_task(spec: TaskSpec) -> Any:
    """Return lm-eval's task object.

    Raises:
        PhatgooseError: there is no such task, its data is unavailable, or routed inference does not
            support its output type or generation options.
    """
    # The identity is part of the cache key, so that changed files are read again.
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
        # datasets' own cache does not notice a change that keeps the file's size and time.
        cache = cache_dir() / "datasets" / hashlib.sha256(determined_by.encode()).hexdigest()[:16]
        fields["dataset_kwargs"] = {**(kwargs or {}), "cache_dir": str(cache)}
    try:
        with lm_eval_seeds():
            # Only a group can change fields of its tasks, so this is a group of one.
            (task,) = manager.load([{"group": "one", "task": [fields]}])["tasks"].values()
    except Exception as error:  # data sets, the network and task code raise anything
        raise PhatgooseError(
            f"task {name} of lm-eval cannot be loaded ({type(error).__name__}: "
            f"{reason_of(error)}). Its data set was searched on the hub and in the hub's cache; "
            "use overlay= to name local files."
        ) from error
    if task.OUTPUT_TYPE not in _OUTPUT_TYPES:
        raise PhatgooseError(
            f"task {name} of lm-eval needs {task.OUTPUT_TYPE}, and routed inference does not "
            "support it. Remove the task from the suite."
        )
    if task.OUTPUT_TYPE == "generate_until":
        generation_options(f"{name} of lm-eval", task.config.generation_kwargs)
    return _with_fixed_documents(task)


def _with_fixed_documents(task: Any) -> Any:
    """Return the task with its current documents fixed. Some tasks draw them on each access."""
    documents = task.task_docs if hasattr(task, "task_docs") else task.eval_docs
    kind = type(task)
    task.__class__ = type(kind.__name__, (kind,), {"eval_docs": property(lambda _: documents)})
    return task


def _manager(include_path: str | None) -> Any:
    """Return the index of all definitions. The first call takes some seconds."""
    own = folder_digests(Path(include_path), _CODE) if include_path else []
    return _make_manager(include_path, json.dumps(own))


@lru_cache(maxsize=4)
def _make_manager(include_path: str | None, determined_by: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _leaves(name: str, include_path: str | None) -> Iterator[str]:
    """Yield the tasks of a task, group or tag without loading data."""
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
    """Yield the tasks of one entry of a group. The entry may be an inline group."""
    if isinstance(member, str):
        yield from _leaves(member, include_path)
    elif isinstance(member, Mapping) and isinstance(member.get("task"), list):
        for inner in member["task"]:
            yield from _members(group, inner, include_path)
    else:
        raise PhatgooseError(
            f"group {group} of lm-eval changes its tasks ({member}). Name the tasks you want."
        )


@contextlib.contextmanager
def lm_eval_seeds() -> Iterator[None]:
    """Seed all generators as `lm_eval.simple_evaluate` does, and restore them afterwards.

    Tasks draw random numbers when they are loaded and when their requests are built.
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
    """Raise PhatgooseError if the task's first documents differ from the stored ones."""
    with lm_eval_seeds():
        found = [asdict(r) for _, r in itertools.islice(_records(spec, task), len(rows))]
    for number, (row, again) in enumerate(zip(rows, found, strict=False)):
        if any(row[key] != again[key] for key in ("input", "targets", "choices", "correct")):
            raise PhatgooseError(
                f"task {spec.name} of lm-eval: document {number} differs from the one that was "
                "stored when the data was prepared, so results would not be comparable. Either its "
                "definition draws without a seed (seed it there), or its own code reads a file "
                "that changed (remove the task's folder from the cache)."
            )
    if len(found) < len(rows):
        raise PhatgooseError(
            f"task {spec.name} of lm-eval has {len(found)} documents, and {len(rows)} were stored "
            "when the data was prepared. Remove its folder from the cache, and run again."
        )


def _records(spec: TaskSpec, task: Any) -> Iterator[tuple[Split, Record]]:
    for number, doc in enumerate(task.eval_docs):
        where = f"task {spec.name} of lm-eval, document {number}"
        try:
            record = _record(spec, task, number, doc)
        except Exception as error:  # templates and the task's own code raise anything
            raise PhatgooseError(
                f"{where}: it cannot be read ({type(error).__name__}: {reason_of(error)}). Fix "
                "the task's definition, or remove the task from the suite."
            ) from error
        check_record(record, where)
        yield "evaluation", record


def _record(spec: TaskSpec, task: Any, number: int, doc: Mapping[str, Any]) -> Record:
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices: list[str] = []
    correct: list[int] = []
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = [str(choice) for choice in task.doc_to_choice(doc)]
        # With several inputs, the choices are contexts, the text gives the index of the correct
        # one, and the target is the continuation that they share.
        given = prompt if task.multiple_input else target
        given = given if isinstance(given, list) else [given]
        correct = [r if isinstance(r, int) else choices.index(str(r)) for r in given]
        targets = [str(target)] if task.multiple_input else [choices[i] for i in correct]
        prompt = "" if task.multiple_input else prompt
    else:
        targets = [str(t) for t in (target if isinstance(target, list) else [target])]
    text = "\n".join(value for value in doc.values() if isinstance(value, str))
    # Ids are numbers, so that sorting them gives lm-eval's order.
    return Record(spec.name, f"{number:08x}", str(prompt), targets, choices, correct, text=text)
