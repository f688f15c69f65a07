"""Store a task's examples as parquet shards, sorted by document, without duplicates.

    records, one at a time ──► 16 buckets by the first digit of the document ──► shards, sorted,
                               (hidden files, bounded memory)                    no duplicates

    <folder>/task.json            description of the records, see `TaskFile`; written last
    <folder>/train/00000.parquet  and so on
    <folder>/evaluation/00000.parquet

At most one bucket is held in memory. Document ids are hashes, so the sorted order is a fixed
shuffle and the first rows are a random sample. A folder is either complete or absent.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.tasks.records import SCHEMA, Kind, Record, Split
from phatgoose.errors import PhatgooseError, reason_of

_FILE = "task.json"
_DIGITS = "0123456789abcdef"
_ROWS_IN_MEMORY = 2**14
_ROWS_PER_SHARD = 50_000
# Columns that do not affect training.
_NOT_TRAINED = ("grades", "text", "cluster")


@dataclass(frozen=True)
class TaskFile:
    """Summary of a task's records that can be read without them.

    Attributes:
        kind: how the task is evaluated.
        fingerprint: SHA-256 of the records of both splits.
        counts: number of records in each split.
        characters: mean length of input plus first target over the training records.
        description: what the task is about, if the source says so.
        origin: where the records come from: source, revision, canary.
    """

    kind: Kind
    fingerprint: str
    counts: dict[Split, int]
    characters: float
    description: str
    origin: dict[str, str]


def write_task(
    folder: Path,
    task: str,
    records: Iterable[tuple[Split, Record]],
    *,
    description: str = "",
    origin: dict[str, str] | None = None,
) -> None:
    """Write a task's records into a new folder, or leave no trace.

    Raises:
        PhatgooseError: there is no record, or only some records of a split have choices.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        spill = _Spill(work)
        for split, record in records:
            spill.add(split, record)
        file = _finish(work, task, spill, description, origin or {})
        (work / _FILE).write_text(json.dumps(asdict(file), indent=1))
        work.chmod(0o755)  # other users may read it too
        if folder.exists() and not is_written(folder):
            shutil.rmtree(folder)  # incomplete remains
        try:
            work.rename(folder)
        except OSError:  # another process was faster, with the same records
            if not is_written(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_written(folder: Path) -> bool:
    """Return whether `write_task` has completed this folder."""
    return (folder / _FILE).exists()


def read_task(folder: Path) -> TaskFile:
    """Return the summary of the records in a folder.

    Raises:
        PhatgooseError: the file is damaged.
    """
    path = folder / _FILE
    try:
        return TaskFile(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, reason_of(error)) from error


def shards(split: Path) -> list[Path]:
    """Return the files of a split in the order of their documents; a file is its own shard."""
    return sorted(split.glob("*.parquet")) if split.is_dir() else [split]


def read_batches(split: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Read one split, a few thousand rows at a time.

    Raises:
        PhatgooseError: a file is missing or damaged, or does not contain records.
    """
    wanted = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    for path in shards(split):
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(8192, columns=columns):
                    if not batch.schema.equals(wanted):
                        raise _unreadable(path, "its columns are not those of records")
                    yield batch
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, reason_of(error)) from error


def read_table(split: Path, columns: list[str] | None = None, limit: int | None = None) -> pa.Table:
    """Read one split, or its first rows, as a table. Errors are those of `read_batches`."""
    schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    batches: list[pa.RecordBatch] = []
    rows = 0
    for batch in read_batches(split, columns):
        batches.append(batch)
        rows += len(batch)
        if limit is not None and rows >= limit:
            break
    table = pa.Table.from_batches(batches, schema)
    return table if limit is None else table.slice(0, limit)


def read_records(split: Path, limit: int | None = None) -> list[Record]:
    """Read one split, or its first records. Errors are those of `read_batches`."""
    return [Record(**row) for row in read_table(split, limit=limit).to_pylist()]


class _Spill:
    """Collects records in buckets, in memory and in temporary files."""

    def __init__(self, work: Path) -> None:
        self._work, self._rows = work, 0
        self._waiting: dict[tuple[Split, str], list[Record]] = {}
        self._files: dict[tuple[Split, str], pa.RecordBatchStreamWriter] = {}
        self.with_choices: dict[Split, set[bool]] = {split: set() for split in get_args(Split)}

    def add(self, split: Split, record: Record) -> None:
        """Add one record."""
        self.with_choices[split].add(bool(record.choices))
        self._waiting.setdefault((split, record.document[0]), []).append(record)
        self._rows += 1
        if self._rows >= _ROWS_IN_MEMORY:
            self.flush()

    def flush(self) -> None:
        """Write the records in memory to the temporary files."""
        for bucket, records in self._waiting.items():
            if bucket not in self._files:
                path = self._work / "-".join((".bucket", *bucket))
                self._files[bucket] = pa.ipc.new_stream(str(path), SCHEMA)
            self._files[bucket].write_batch(_batch(records))
        self._waiting, self._rows = {}, 0

    def bucket(self, split: Split, digit: str) -> pa.Table:
        """Return the records of one bucket, sorted; keep the first of each document."""
        key = (split, digit)
        parts = []
        if key in self._files:
            self._files.pop(key).close()
            path = self._work / "-".join((".bucket", *key))
            with pa.OSFile(str(path)) as file:
                parts += list(pa.ipc.open_stream(file))
            path.unlink()
        parts += [_batch(self._waiting.pop(key))] if key in self._waiting else []
        table = pa.Table.from_batches(parts, SCHEMA)
        if not len(table):
            return table
        document = table["document"].to_numpy()
        order = np.argsort(document, kind="stable")
        document = document[order]
        first = np.concatenate([[True], document[1:] != document[:-1]])
        return table.take(pa.array(order[first]))


def _batch(records: list[Record]) -> pa.RecordBatch:
    columns = [
        pa.array([getattr(record, field.name) for record in records], field.type)
        for field in SCHEMA
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _finish(
    work: Path, task: str, spill: _Spill, description: str, origin: dict[str, str]
) -> TaskFile:
    """Write the shards of both splits from the buckets."""
    kind = _kind(task, spill)
    digest = hashlib.sha256()
    counts: dict[Split, int] = {}
    characters = 0
    for split in sorted(get_args(Split)):
        digest.update(f"{split}\n".encode())
        writer = _Shards(work / split)
        for digit in _DIGITS:
            for record in writer.write(spill.bucket(split, digit)):
                digest.update(json.dumps(list(record.values())).encode() + b"\n")
                if split == "train":
                    characters += len(record["input"]) + len(record["targets"][0])
        counts[split] = writer.close()
    mean = characters / max(1, counts["train"])
    return TaskFile(kind, digest.hexdigest(), counts, mean, description, origin)


def _kind(task: str, spill: _Spill) -> Kind:
    """Return how a task is evaluated. Training records only matter without evaluation records."""
    found = spill.with_choices["evaluation"] or spill.with_choices["train"]
    if not found:
        raise PhatgooseError(f"task {task} has no examples. Choose other members.")
    if len(found) > 1:
        raise PhatgooseError(
            f"task {task} mixes multiple choice with generation. Define a separate task for each."
        )
    return "multiple_choice" if found == {True} else "generation"


class _Shards:
    """The parquet files of one split."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._rows = self._rows_before = self._files = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> Iterator[dict[str, list[str]]]:
        """Append rows and yield them as dictionaries, without the columns not used in training."""
        for start in range(0, len(table), 4096):
            part = table.slice(start, 4096)
            full = self._rows - self._rows_before + len(part) > _ROWS_PER_SHARD
            if self._writer is None or full:
                self._next()
            assert self._writer is not None
            self._writer.write_table(part)
            self._rows += len(part)
            yield from part.drop_columns(list(_NOT_TRAINED)).to_pylist()

    def close(self) -> int:
        """Close the last file and return the number of rows; an empty split gets an empty file."""
        if self._writer is None:
            self._next()
        assert self._writer is not None
        self._writer.close()
        return self._rows

    def _next(self) -> None:
        if self._writer is not None:
            self._writer.close()
        path = self._folder / f"{self._files:05}.parquet"
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._files += 1
        self._rows_before = self._rows


def _unreadable(path: Path, reason: str) -> PhatgooseError:
    return PhatgooseError(
        f"{path} cannot be read ({reason}). Delete its folder and run again to create it again."
    )
