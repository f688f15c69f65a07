"""Read a user's own tasks from JSON Lines, CSV, TSV or parquet files, one example per line or row.

    {"input": "Translate to French: cat", "target": "chat"}
    {"input": "2 + 2 =", "target": ["4", "four"]}
    {"input": "Is ice warm?", "choices": ["yes", "no"], "correct": 1}

`correct` is an index into the choices, the correct choice itself, or a list of either. In CSV all
values are text: a list is written as JSON, and ambiguous values are rejected. The prompt is the
input as it is. A target or choice follows it, separated by a space unless the input ends with
whitespace. The optional column `cluster` groups examples that are not independent, such as
questions about one passage, see `harness.tasks.clusters`.
"""

import csv
import glob
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.tasks.files import file_digest
from harness.tasks.records import Record, Split, check_record, named, split_of
from harness.tasks.sources.source import TaskRecords, options_of
from harness.tasks.spec import TaskSpec
from phatgoose.errors import PhatgooseError, did_you_mean, reason_of

_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# Longer lines are rejected before they are read into memory completely.
_LONGEST_LINE = 16 * 2**20
_INDEX = re.compile(r"\s*[0-9]{1,9}\s*")


@dataclass(frozen=True)
class Options:
    """Options for reading the files.

    Attributes:
        input, target, choices, correct, cluster: names of the columns.
        evaluation: files or patterns whose examples form the evaluation split. Without them, one
            fifth of all examples does.
    """

    input: str = "input"
    target: str = "target"
    choices: str = "choices"
    correct: str = "correct"
    cluster: str = "cluster"
    evaluation: list[str] | None = None


def check(spec: TaskSpec) -> None:
    """Reject unknown options, and patterns that match no file."""
    _all_files(spec)


def expand(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return one task per file that `files` names: a pattern, a folder, or a list of them."""
    if "files" not in group or (group["files"] is None and group.get("tasks")):
        return {}
    if not group["files"]:
        raise PhatgooseError(
            f"{group['name']}: no files are given. Name one per task, such as "
            f"files='/data/*.jsonl' ({', '.join(_SUFFIXES)})."
        )
    patterns = [group["files"]] if isinstance(group["files"], str) else list(group["files"])
    tasks: dict[str, dict[str, Any]] = {}
    for file in _files(str(group["name"]), patterns):
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(file).stem).lstrip(".-") or "task"
        if name in tasks:
            raise PhatgooseError(
                f"{group['name']}: {tasks[name]['members'][0]} and {file} would both become the "
                f"task {name}. Rename one, or name the tasks one by one."
            )
        tasks[name] = {"members": [file]}
    return tasks


def identity(spec: TaskSpec) -> Any:
    """Return the SHA-256 of each file's content."""
    members, evaluation = _all_files(spec)
    try:
        return [[file_digest(Path(file)) for file in files] for files in (members, evaluation)]
    except PhatgooseError as error:
        raise PhatgooseError(f"task {spec.name}: {error}") from error


def missing(spec: TaskSpec) -> str | None:
    """Return which files are missing."""
    absent = [file for files in _all_files(spec) for file in files if not Path(file).exists()]
    return f"cannot find {', '.join(absent)}" if absent else None


def read(specs: Sequence[TaskSpec]) -> Iterator[TaskRecords]:
    """Read tasks, line by line."""
    for spec in specs:
        yield TaskRecords(spec, _records(spec))


def with_space(prompt: str) -> str:
    """Return the prompt with a trailing space unless it ends with whitespace."""
    return prompt if prompt[-1:].isspace() else prompt + " "


def _records(spec: TaskSpec) -> Iterator[tuple[Split, Record]]:
    options = options_of(Options, spec)
    members, evaluation = _all_files(spec)
    for files, given in ((members, "train" if evaluation else None), (evaluation, "evaluation")):
        for file in files:
            empty = True
            for where, example in _examples(file, options):
                empty = False
                record = _record(spec.name, example, where, options)
                check_record(record, where)
                split: Split = given or split_of(spec.name, record.input)  # type: ignore[assignment]
                yield split, record
            if empty:
                raise PhatgooseError(f"task {spec.name}: {file} has no examples")


def _all_files(spec: TaskSpec) -> tuple[list[str], list[str]]:
    options = options_of(Options, spec)
    return _files(spec.name, spec.members), _files(spec.name, options.evaluation or [])


def _files(name: str, patterns: Sequence[str]) -> list[str]:
    """Return the files of patterns and folders; the matches of each are sorted by name."""
    found: list[str] = []
    for pattern in map(str, patterns):
        path = Path(pattern).expanduser().absolute()  # actors have other working directories
        if path.is_dir():
            matches = [str(p) for p in sorted(path.iterdir()) if p.suffix in _SUFFIXES]
        elif glob.has_magic(pattern) and not path.exists():
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns, too)
        else:
            matches = [str(path)]
        if not matches:
            raise PhatgooseError(
                f"{name}: no file matches {pattern} (searched from {Path.cwd()}; a folder must "
                f"contain files that end in {', '.join(_SUFFIXES)})"
            )
        for file in matches:
            if Path(file).suffix not in _SUFFIXES:
                raise PhatgooseError(f"{name}: {file} does not end in {', '.join(_SUFFIXES)}")
        found += matches
    return list(dict.fromkeys(found))


def _examples(
    file: str,
    options: Options = Options(),
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the examples of a file, each with its place."""
    suffix = Path(file).suffix
    try:
        if suffix == ".parquet":
            yield from _parquet(file)
        elif suffix == ".jsonl":
            yield from _json_lines(file)
        else:
            yield from _csv(file, "\t" if suffix == ".tsv" else ",", options)
    except OSError as error:
        raise PhatgooseError(f"cannot read {file}: {reason_of(error)}") from error


def _json_lines(file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for where, line in _lines(file):
        if not line.strip():
            continue
        try:
            example = json.loads(line, object_pairs_hook=_once_each)
        except (ValueError, RecursionError) as error:
            raise PhatgooseError(f"{where}: not JSON ({error})") from error
        if not isinstance(example, dict):
            raise PhatgooseError(
                f'{where}: not an object. Write {{"input": text, "target": text or list}}'
                ' or {"input": text, "choices": list, "correct": index, text or list}'
            )
        yield where, example


def _lines(file: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a UTF-8 file, each with its place."""
    with Path(file).open("rb") as stream:
        number = 0
        while line := stream.readline(_LONGEST_LINE):
            number += 1
            where = f"{file}, line {number}"
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                raise PhatgooseError(
                    f"{where}: longer than {_LONGEST_LINE // 2**20} MiB. Put one example on each "
                    "line."
                )
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PhatgooseError(
                    f"{where}: byte {error.start + 1} is not UTF-8. Convert the file to UTF-8."
                ) from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise ValueError for a duplicate key; `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key {_twice([key for key, _ in pairs])!r}")
    return found


def _twice(names: Sequence[str]) -> str | None:
    """Return the first name that occurs twice."""
    return next((name for name in names if names.count(name) > 1), None)


def _csv(file: str, delimiter: str, options: Options) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(_LONGEST_LINE)
    reader = csv.DictReader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    try:
        header = list(reader.fieldnames or ())
        if (name := _twice(header)) is not None:
            raise PhatgooseError(f"{file}, line 1: duplicate column {name!r}. Rename one.")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row or None in row.values():
                raise PhatgooseError(f"{where}: it does not have the header's {len(header)} fields")
            yield where, _from_csv(row, options, where)
    except csv.Error as error:  # in the row after the last one read
        raise PhatgooseError(f"{file}, line {reader.line_num + 1}: {error}") from error


def _from_csv(row: Mapping[str, str], options: Options, where: str) -> dict[str, Any]:
    """Return a row with its lists parsed; raise PhatgooseError for an ambiguous field."""
    example: dict[str, Any] = {k: v for k, v in row.items() if v != "" or k == options.input}
    for name in (options.target, options.choices, options.correct):
        if name in example:
            example[name] = _list_of_json(example[name])
    target = example.get(options.target)
    if isinstance(target, list) and not all(isinstance(item, str) for item in target):
        raise PhatgooseError(
            f"{where}: {options.target}={_short(row[options.target])}: it could be text or a list "
            'of answers. For a list, quote its items, as in ["1", "2"]; for text, use JSON Lines.'
        )
    choices, correct = example.get(options.choices), example.get(options.correct)
    if isinstance(choices, list) and isinstance(correct, str) and _INDEX.fullmatch(correct):
        texts = [str(choice).strip() for choice in choices]
        index, itself = int(correct), correct.strip()
        if itself in texts and not (index < len(texts) and texts[index] == itself):
            raise PhatgooseError(
                f"{where}: {options.correct}={itself}: it could be an index or the choice "
                f'{itself!r}. For the choice, write ["{itself}"]; for an index, write [{itself}].'
            )
    return example


def _list_of_json(value: str) -> Any:
    """Return the list that a CSV field contains as JSON; any other text unchanged."""
    if re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parquet(file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            if (name := _twice(opened.schema_arrow.names)) is not None:
                raise PhatgooseError(f"{file}: duplicate column {name!r}. Rename one.")
            for batch in opened.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", {k: v for k, v in row.items() if v is not None}
    except pa.ArrowException as error:
        raise PhatgooseError(f"{file} is not a parquet file: {reason_of(error)}") from error
    # Raised for Arrow values that Python cannot represent, such as the year 20,000.
    except (ValueError, OverflowError, TypeError, RecursionError) as error:
        raise PhatgooseError(
            f"{file}, after row {number}: it cannot be read ({reason_of(error)})"
        ) from error


def _record(task: str, example: Mapping[str, Any], where: str, options: Options) -> Record:
    text = _column(example, options.input, "input", where)
    if not isinstance(text, str):
        raise PhatgooseError(f"{where}: {options.input} is {_short(text)}, not text")
    prompt = _whole(with_space(text), where)
    cluster = example.get(options.cluster, "")
    if not isinstance(cluster, str | int):
        raise PhatgooseError(f"{where}: {options.cluster} is {_short(cluster)}, not a name")
    cluster = _whole(str(cluster), where)
    if options.choices not in example:
        target = _column(example, options.target, "target", where)
        return named(Record(task, "", prompt, _texts(target, where), [], [], cluster=cluster))
    if options.target in example:
        raise PhatgooseError(
            f"{where}: it has both {options.target} and {options.choices}. Give one of them; with "
            f"{options.choices}, give the correct one as {options.correct}."
        )
    choices = _texts(example[options.choices], where)
    given = _column(example, options.correct, "correct", where)
    correct = [
        _index(one, choices, where) for one in (given if isinstance(given, list) else [given])
    ]
    if len(set(choices)) < 2 and all(choices):
        raise PhatgooseError(
            f"{where}: there is only one choice. Give at least two, or a target without choices."
        )
    targets = [choices[i] for i in correct]
    return named(Record(task, "", prompt, targets, choices, correct, cluster=cluster))


def _column(example: Mapping[str, Any], name: str, option: str, where: str) -> Any:
    if name in example:
        return example[name]
    hint = did_you_mean(name, example)
    raise PhatgooseError(
        f"{where}: no column {name}; it has {_printable(example)}{f'; {hint}' if hint else '.'} "
        f"Set load_opts.{option} to the column's name."
    )


def _index(given: Any, choices: list[str], where: str) -> int:
    """Return the index of the correct choice, given by its index (number or text) or its text."""
    if isinstance(given, str):
        if given.strip() in choices:
            return choices.index(given.strip())
        given = int(given) if _INDEX.fullmatch(given) else given
    if type(given) is int and 0 <= given < len(choices):
        return given
    raise PhatgooseError(
        f"{where}: the correct choice {_short(given)} is neither an index into the {len(choices)} "
        "choices nor one of them"
    )


def _texts(value: Any, where: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        is_number = isinstance(text, int | float) and not isinstance(text, bool)
        if not (isinstance(text, str) or (is_number and math.isfinite(text))):
            raise PhatgooseError(f"{where}: an answer is {_short(value)}, not text")
    return [_whole(str(text).strip(), where) for text in texts]


def _whole(text: str, where: str) -> str:
    """Return the text if UTF-8 can encode it; raise PhatgooseError otherwise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise PhatgooseError(
            f"{where}: {half} is a lone surrogate (half a character), and no tokenizer accepts it. "
            "Remove it, or write the complete character."
        ) from error
    return text


def _printable(names: Iterable[str]) -> str:
    """Join names for an error message; escape lone surrogates so that it can be printed."""
    return ", ".join(names).encode(errors="backslashreplace").decode() or "nothing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
