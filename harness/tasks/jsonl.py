"""A user's own tasks: JSON Lines files, one example a line.

    {"input": "Translate to French: cat", "target": "chat"}
    {"input": "2 + 2 =", "target": ["4", "four"]}
    {"input": "Is ice warm?", "choices": ["yes", "no"], "correct": 1}

The prompt is the input as it stands; a target or choice follows it, with a space in between where
the input does not end with white space.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.tasks.records import Record, Split, distinct, document_id, split_of
from phatgoose.errors import PhatgooseError


def fingerprint_of_files(task: str, files: Sequence[str]) -> list[str]:
    """SHA-256 of each file's content; PhatgooseError if one cannot be read."""
    digests = []
    for file in files:
        try:
            with Path(file).open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise PhatgooseError(f"task {task}: cannot read {file}: {error.strerror}") from error
    return digests


def read_splits(task: str, files: Sequence[str]) -> dict[Split, list[Record]]:
    """The records of these files, by split.

    Raises:
        PhatgooseError: a line that is no example, naming file and line.
    """
    splits: dict[Split, list[Record]] = {"train": [], "evaluation": []}
    for file in files:
        for line, example in _lines(file):
            try:
                record = _record(task, example)
            except (KeyError, TypeError, ValueError) as error:
                raise PhatgooseError(
                    f'{file}, line {line}: {error}; an example is {{"input": text, "target": text '
                    'or list} or {"input": text, "choices": list, "correct": index or list}'
                ) from error
            splits[split_of(task, example["input"])].append(record)
    return {split: distinct(records) for split, records in splits.items()}


def _lines(file: str) -> Iterator[tuple[int, Any]]:
    with Path(file).open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except ValueError as error:
                raise PhatgooseError(
                    f"{file}, line {number}: not JSON in UTF-8: {error}"
                ) from error


def _record(task: str, example: Any) -> Record:
    if not isinstance(example, dict) or not isinstance(example.get("input"), str):
        raise ValueError("it has no input")
    prompt = example["input"]
    prompt += "" if prompt[-1:].isspace() else " "
    if "choices" not in example:
        targets = _texts("target", example.get("target"))
        return Record(task, document_id(task, prompt), prompt, targets, [], [])
    choices = _texts("choices", example["choices"])
    right = example.get("correct")
    correct: list[Any] = right if isinstance(right, list) else [right]
    if not correct or not all(type(i) is int and 0 <= i < len(choices) for i in correct):
        raise ValueError(f"correct is {right!r}, not an index into its {len(choices)} choices")
    targets = [choices[i] for i in correct]
    return Record(task, document_id(task, prompt), prompt, targets, choices, correct)


def _texts(key: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{key} is {value!r}, not text")
    return [text.strip() for text in texts]
