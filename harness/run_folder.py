"""The files of a run folder: the schemas of the parquet files, and functions to read and write.

A run folder contains

    scores.parquet                one row per router, task and metric
    summary.parquet               the same with confidence intervals and means over tasks
    samples/<suite>/<router>.parquet    one row per document
    routing/<suite>/<router>.parquet    one row per linear and expert: the share of routed weight
    answers/                      what evaluation actors answered; see evaluation/answer_files.py
    training/<expert>.parquet     one row per recorded training step and evaluation
    overlap.parquet               one row per suite task and expert that share documents
    jobs.parquet                  one row per expert to train: the state of its job
    evaluations.parquet           one row per router and suite: the state of its evaluation
    run.json                      configuration, versions, hardware, start and end times
    status.json                   progress of a running call
    requests.json                 a hash of each task's requests; later calls must not change them
    answers.json                  the conditions under which each router's answers were computed

The schemas of the tables are in `harness.run_tables`; they are names of this module, too.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.run_tables import ANSWERS as ANSWERS
from harness.run_tables import CONDITIONS as CONDITIONS
from harness.run_tables import EVALUATIONS as EVALUATIONS
from harness.run_tables import JOBS as JOBS
from harness.run_tables import OVERLAP as OVERLAP
from harness.run_tables import ROUTING as ROUTING
from harness.run_tables import SAMPLES as SAMPLES
from harness.run_tables import SCORES as SCORES
from harness.run_tables import SUMMARY as SUMMARY
from harness.run_tables import TRAINING as TRAINING
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

SCORES_FILE = "scores.parquet"
SUMMARY_FILE = "summary.parquet"
OVERLAP_FILE = "overlap.parquet"
JOBS_FILE = "jobs.parquet"
EVALUATIONS_FILE = "evaluations.parquet"
RUN_FILE = "run.json"
STATUS_FILE = "status.json"
REQUESTS_FILE = "requests.json"
ANSWERS_FILE = "answers.json"
ANSWERS_FOLDER = "answers"
SAMPLES_FOLDER = "samples"
ROUTING_FOLDER = "routing"
TRAINING_FOLDER = "training"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_LONGEST_NAME = 200


class DamagedTable(PhatgooseError):
    """A parquet file that is truncated, altered, or of another version."""


def file_stem(name: str) -> str:
    """Return the file name, without extension, for a router or an expert.

    `single:plural` becomes `single@plural`. No two names share a file, since names never contain
    `@`.

    Raises:
        PhatgooseError: the name contains characters other than letters, digits and `_ . : -`,
            starts with one of `. : -`, or is too long.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise PhatgooseError(
            f"the name {name!r} cannot be used as a file name. Use at most {_LONGEST_NAME} "
            "letters, digits and _ . : -, and start with a letter, a digit or _."
        )
    return name.replace(":", "@")


def router_file(prefix: str, suite: str, router: str) -> str:
    """Return the path of a router's file for one suite, below a folder of the run folder."""
    return f"{prefix}/{file_stem(suite)}/{file_stem(router)}.parquet"


def samples_file(suite: str, router: str) -> str:
    """Return the path of a router's samples in the run folder."""
    return router_file(SAMPLES_FOLDER, suite, router)


def routing_file(suite: str, router: str) -> str:
    """Return the path of a router's routing in the run folder."""
    return router_file(ROUTING_FOLDER, suite, router)


def training_file(expert: str) -> str:
    """Return the path of an expert's training curve in the run folder."""
    return f"{TRAINING_FOLDER}/{file_stem(expert)}.parquet"


def write_table(folder: Folder, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """Write rows atomically as the parquet file `name`; raise what `table_bytes` raises."""
    folder.write(name, table_bytes(name, schema, rows))


def table_bytes(name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> bytes:
    """Return the bytes of the parquet file `name` with these rows.

    Raises:
        PhatgooseError: a row has missing or extra columns, or a value does not fit its column.
    """
    columns = set(schema.names)
    for i, row in enumerate(rows):
        if wrong := columns ^ row.keys():
            names = ", ".join(sorted(wrong))
            raise PhatgooseError(
                f"{name}: row {i} has missing or extra columns: {names} (see harness/run_folder.py)"
            )
    arrays = [_array(name, field, [row[field.name] for row in rows]) for field in schema]
    return _as_parquet(pa.table(arrays, schema=schema))


def write_arrow(folder: Folder, name: str, table: pa.Table) -> None:
    """Write a table with the schema of its file atomically as the parquet file `name`."""
    folder.write(name, _as_parquet(table))


def _as_parquet(table: pa.Table) -> bytes:
    """Return a table as parquet: samples and routing with a row group for each run of one task.

    Their readers want one task at a time.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        starts = _starts_of_tasks(table) if table.schema in (SAMPLES, ROUTING) else []
        for start, end in pairwise([0, *starts, len(table)]):
            writer.write_table(table.slice(start, end - start))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _starts_of_tasks(table: pa.Table) -> list[int]:
    """Return the places of the rows whose task differs from that of the row before."""
    tasks = table["task"]
    changed: list[int] = pc.indices_nonzero(pc.not_equal(tasks[1:], tasks[:-1])).to_pylist()
    return [place + 1 for place in changed]


def _array(name: str, field: pa.Field, values: list[Any]) -> pa.Array:
    if pa.types.is_map(field.type):
        values = [sorted(value.items()) for value in values]
    try:
        array = pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise PhatgooseError(
            f"{name}: column {field.name} only takes {field.type}: {error}"
        ) from error
    if array.null_count and not field.nullable:
        raise PhatgooseError(
            f"{name}: column {field.name} has a missing value, and is not nullable"
        )
    return array


def read_table(
    folder: Folder, name: str, schema: pa.Schema, columns: list[str] | None = None
) -> pa.Table:
    """Read the parquet file `name` of a run folder: all columns, or the named ones.

    Columns that are missing because an earlier version wrote the file are null.

    Raises:
        PhatgooseError: the file is missing, unreadable, or has columns other than `schema`.
    """
    if not folder.exists(name):
        raise PhatgooseError(f"{folder}/{name} is missing. Run the stage that writes it.")
    with damage_named(folder, name):
        # Without Arrow's threads: a short process that exits while they end is aborted.
        file = pq.ParquetFile(pa.BufferReader(folder.read(name)))
        table = file.read(columns, use_threads=False)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    return with_schema(folder, name, table, schema)


@contextmanager
def damage_named(folder: Folder, name: str) -> Iterator[None]:
    """Turn Arrow's exceptions while the file `name` is read into a PhatgooseError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DamagedTable(
            f"{folder}/{name} is damaged ({type(error).__name__}). Delete it and run again."
        ) from error


def with_schema(folder: Folder, name: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table of the file `name`, with nulls in columns that an earlier version lacks.

    Raises:
        PhatgooseError: the table has columns other than `schema`.
    """
    for place, field in enumerate(schema):
        if field.name not in table.schema.names and field.nullable:  # written by an earlier version
            nothing = pa.nulls(len(table), field.type)
            table = table.add_column(min(place, table.num_columns), field, nothing)
    if not table.schema.equals(schema):
        raise DamagedTable(
            f"{folder}/{name} has different columns than this version writes. "
            "Delete it and run again, or use a new run.dir."
        )
    return table


def read_folder(folder: Folder, prefix: str, schema: pa.Schema) -> pa.Table:
    """Read all parquet files below `prefix`, such as training curves, as one table in memory.

    A missing or empty folder gives a table without rows.

    Raises:
        PhatgooseError: as in `read_table`.
    """
    names = [name for name in folder.names(f"{prefix}/") if name.endswith(".parquet")]
    tables = [read_table(folder, name, schema) for name in names]
    return pa.concat_tables([schema.empty_table(), *tables])


def split_by_suite(folder: Folder) -> None:
    """Give the results of version 0.1.0 a file per suite: samples/<router>.parquet had them all."""
    for prefix, schema in ((SAMPLES_FOLDER, SAMPLES), (ROUTING_FOLDER, ROUTING)):
        for name in folder.names(f"{prefix}/"):
            _, *rest = name.split("/")
            if len(rest) != 1:
                continue
            table = read_table(folder, name, schema)
            for suite in dict.fromkeys(table["suite"].to_pylist()):
                own = f"{prefix}/{file_stem(suite)}/{rest[0]}"
                if not folder.exists(own):
                    rows = table.filter(pc.equal(table["suite"], suite)).to_pylist()
                    for row in rows if schema is SAMPLES else ():
                        row["metrics"] = dict(row["metrics"])
                    write_table(folder, own, schema, rows)
            folder.delete(name)


def write_json(folder: Folder, name: str, record: dict[str, Any]) -> None:
    """Write a small JSON file of the run folder."""
    folder.write(name, (json.dumps(record, indent=2) + "\n").encode())


def write_run(folder: Folder, record: dict[str, Any]) -> None:
    """Write run.json: configuration, versions, hardware, start and end times."""
    write_json(folder, RUN_FILE, record)


def read_run(folder: Folder) -> dict[str, Any]:
    """Read run.json.

    Raises:
        PhatgooseError: the file is missing or is not a JSON object.
    """
    if not folder.exists(RUN_FILE):
        raise PhatgooseError(f"{folder}/{RUN_FILE} is missing: this is not a run folder")
    return read_json(folder, RUN_FILE)


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Read a small JSON file of the run folder.

    Raises:
        PhatgooseError: the file is missing or is not a JSON object.
    """
    try:
        record = json.loads(folder.read(name))
    except ValueError as error:
        raise PhatgooseError(
            f"{folder}/{name} is not JSON ({error}). Delete it and run again."
        ) from error
    if not isinstance(record, dict):
        raise PhatgooseError(f"{folder}/{name} is not a JSON object. Delete it and run again.")
    return record
