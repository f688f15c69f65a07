"""The one record type of every task, its parquet files, and its split."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from phatgoose.errors import PhatgooseError

Split = Literal["train", "evaluation"]
Kind = Literal["multiple_choice", "generation"]

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("targets", pa.list_(pa.string()), nullable=False),
        pa.field("choices", pa.list_(pa.string()), nullable=False),
        pa.field("correct", pa.list_(pa.int64()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Record:
    """One example of a task.

    Attributes:
        task: the task's name.
        document: what identifies the example within its task, see `document_id`.
        input: the whole prompt; the target or a choice follows it with nothing in between.
        targets: the accepted answers; the first is the one trained on.
        choices: the answers to choose from; empty where the answer is generated.
        correct: indices of the right choices, at least one where there are choices.
    """

    task: str
    document: str
    input: str
    targets: list[str]
    choices: list[str]
    correct: list[int]


def split_of(task: str, text: str) -> Split:
    """Which split an example belongs to: one fifth is for evaluation, chosen by a stable hash.

    Inputs that differ only in case and spacing fall into the same split.
    """
    return "evaluation" if int(_digest(task, text)[-8:], 16) % 5 == 0 else "train"


def document_id(task: str, text: str) -> str:
    """A stable name for an example: 16 hexadecimal digits of a hash.

    Inputs that differ only in case and spacing have the same one.
    """
    return _digest(task, text)[:16]


def _digest(task: str, text: str) -> str:
    words = " ".join(text.lower().split())
    return hashlib.sha256(f"{task}\n{words}".encode()).hexdigest()


def distinct(records: Iterable[Record]) -> list[Record]:
    """The first record of each document, in the order of the documents.

    That order is a fixed shuffle, so the first rows are a fair sample of all of them.
    """
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.document, record)
    return [first[document] for document in sorted(first)]


def kind_of(task: str, records: list[Record]) -> Kind:
    """Check the records of a task and say how it is evaluated.

    Raises:
        PhatgooseError: no record, an empty answer, no right choice, or both kinds in one task.
    """
    if not records:
        raise PhatgooseError(f"task {task} has no examples: choose another member for it")
    for record in records:
        shown = f"task {task} has a faulty example ({record.input[-60:]!r})"
        if not record.targets or not all(target.strip() for target in record.targets):
            raise PhatgooseError(f"{shown}: its target is empty; leave the task out")
        if not all(choice.strip() for choice in record.choices):
            raise PhatgooseError(f"{shown}: one of its choices is empty; leave the task out")
        if record.choices and not record.correct:
            raise PhatgooseError(f"{shown}: none of its choices is right; leave the task out")
    with_choices = sum(bool(record.choices) for record in records)
    if 0 < with_choices < len(records):
        raise PhatgooseError(
            f"task {task} mixes multiple choice ({with_choices} examples) with generation "
            f"({len(records) - with_choices}): give each kind a task of its own"
        )
    return "multiple_choice" if with_choices else "generation"


def fingerprint_of(splits: dict[Split, list[Record]]) -> str:
    """SHA-256 of the records themselves, whatever file they are stored in."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        digest.update(f"{split}\n".encode())
        for record in splits[split]:
            digest.update(json.dumps(astuple(record)).encode() + b"\n")
    return digest.hexdigest()


def write_records(path: Path, records: Iterable[Record], metadata: dict[str, str]) -> None:
    """Write records to a parquet file, all or nothing; `metadata` goes into its schema."""
    rows = [asdict(record) for record in records]
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> pa.Table:
    """Read a file of records as a table of `SCHEMA`.

    Raises:
        PhatgooseError: the file is missing, damaged, or holds something else.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    if not table.schema.equals(SCHEMA):
        raise _unreadable(path, "its columns are not those of records")
    return table


def read_records(path: Path) -> list[Record]:
    """Read a file of records; errors are those of `read_table`."""
    return [Record(**row) for row in read_table(path).to_pylist()]


def read_metadata(path: Path) -> dict[str, str]:
    """Read only the metadata that `write_records` stored; errors are those of `read_table`."""
    try:
        stored = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    return {key.decode(): value.decode() for key, value in stored.items()}


def _unreadable(path: Path, reason: object) -> PhatgooseError:
    text = " ".join(str(reason).split())
    return PhatgooseError(
        f"{path} cannot be read ({text}): delete its folder and start again to make it anew"
    )
