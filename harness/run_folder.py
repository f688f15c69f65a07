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

The meaning of every column is given next to its type below. It is also stored in the files as the
metadata `meaning` of the field.
"""

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


def _column(name: str, kind: pa.DataType, meaning: str, null: str | None = None) -> pa.Field:
    """Return a column. `null` gives the meaning of a missing value; None forbids missing values."""
    text = f"{meaning}; null: {null}" if null else meaning
    return pa.field(name, kind, nullable=null is not None, metadata={"meaning": text})


_ROUTER = _column("router", pa.string(), "name of the router, e.g. phatgoose or single:<expert>")
_SUITE = _column("suite", pa.string(), "name of the suite of evaluation tasks")
_TASK = _column("task", pa.string(), "name of the evaluation task")
_EXPERT = _column("expert", pa.string(), "name of the expert")
_ZERO_SHOT = _column(
    "zero_shot", pa.bool_(), "whether the router was chosen without using the evaluation data"
)
_SIDE_INFORMATION = _column(
    "side_information",
    pa.string(),
    "information the router uses besides the pool, its profiles and the query",
    null="nothing",
)

_IN_0_1_0 = "written by version 0.1.0"
# Only rows with equal values in these columns are comparable.
CONDITIONS = (
    _column("dtype", pa.string(), "dtype of the base", null=_IN_0_1_0),
    _column(
        "device",
        pa.string(),
        "type of the device that computed the answers: cpu, cuda or mps",
        null=_IN_0_1_0,
    ),
    _column(
        "versions",
        pa.string(),
        "versions of torch, transformers and lm_eval, as JSON",
        null=_IN_0_1_0,
    ),
    _column(
        "code",
        pa.string(),
        "hash of the source code that scores, generates and computes metrics",
        null=_IN_0_1_0,
    ),
)

SCORES = pa.schema(
    [
        _column("run", pa.string(), "name of the run, i.e. of its folder"),
        _column("base", pa.string(), "name of the base"),
        _column(
            "manifest", pa.string(), "id of the pool: a hash of its experts' names and contents"
        ),
        _ROUTER,
        _column(
            "top_k",
            pa.int32(),
            "experts kept per token or query",
            null="not an option of the router",
        ),
        _column("options", pa.string(), "kind and options of the router, as JSON"),
        _ZERO_SHOT,
        _SIDE_INFORMATION,
        _SUITE,
        _TASK,
        _column(
            "metric",
            pa.string(),
            "lm-eval's own (acc, acc_norm, exact_match, ...), acc_paper, nll, rouge_l, "
            "multiple_choice_grade or bigbench_normalized",
        ),
        _column("value", pa.float64(), "mean over the documents; shares as 0 to 1, nll in nats"),
        _column("stderr", pa.float64(), "standard error of the value", null="lm-eval reports none"),
        _column(
            "documents",
            pa.string(),
            "hash of the requests and correct answers; rows with equal hashes are comparable",
        ),
        _column("n", pa.int64(), "number of documents"),
        _column(
            "cut",
            pa.int64(),
            "number of documents whose prompt was truncated to the base's positions",
            null=_IN_0_1_0,
        ),
        _column("seconds", pa.float64(), "time the actors spent on this router and task"),
        _column(
            "tokens",
            pa.int64(),
            "tokens run through the model; generated tokens are counted by their limit",
        ),
        _column(
            "expert",
            pa.string(),
            "the expert chosen by oracle or best_individual",
            null="another router",
        ),
        *CONDITIONS,
        _column(
            "router_code", pa.string(), "hash of the source code of the router", null=_IN_0_1_0
        ),
        _column("answers", pa.string(), "key of the answers that were scored", null=_IN_0_1_0),
    ]
)

OVERLAP = pa.schema(
    [
        _SUITE,
        _TASK,
        _EXPERT,
        _column("documents", pa.int64(), "distinct documents of the evaluation task"),
        _column("exact", pa.int64(), "how many are also inputs of the expert's training data"),
        _column("shared", pa.int64(), "how many share 8 consecutive words with such an input"),
        _column("example", pa.string(), "the beginning of one such document"),
    ]
)

SUMMARY = pa.schema(
    [
        _SUITE,
        _ROUTER,
        _ZERO_SHOT,
        _SIDE_INFORMATION,
        _column("metric", pa.string(), "a metric, or `primary`: the primary metric of each task"),
        _column(
            "task",
            pa.string(),
            "name of the evaluation task",
            null="the unweighted mean over the suite's tasks that have the metric",
        ),
        _column("value", pa.float64(), "the metric"),
        _column("low", pa.float64(), "lower end of its 95 % bootstrap interval"),
        _column("high", pa.float64(), "upper end of its 95 % bootstrap interval"),
        _column(
            "difference", pa.float64(), "value minus that of merged", null="no comparable merged"
        ),
        _column("difference_low", pa.float64(), "lower end of its paired 95 % interval", null="-"),
        _column("difference_high", pa.float64(), "upper end of its paired 95 % interval", null="-"),
        _column("n", pa.int64(), "number of documents"),
        _column("clusters", pa.int64(), "number of clusters of documents", null=_IN_0_1_0),
        _column(
            "comparable",
            pa.bool_(),
            "whether it was measured with the dtype, device, versions and code of merged "
            "(without merged, of most routers)",
            null=_IN_0_1_0,
        ),
    ]
)

SAMPLES = pa.schema(
    [
        _ROUTER,
        _SUITE,
        _TASK,
        _column("document", pa.string(), "id of the document, unique within its task"),
        _column("target", pa.string(), "the correct answer"),
        _column("prediction", pa.string(), "the choice or text that the model answered"),
        _column("correct", pa.bool_(), "whether the primary metric counts the answer as correct"),
        _column(
            "choice_scores",
            pa.list_(pa.float64()),
            "summed log-likelihood of each choice, in nats; empty for generation",
        ),
        _column("metrics", pa.map_(pa.string(), pa.float64()), "value of each metric, by name"),
        _column(
            "cluster",
            pa.string(),
            "cluster of documents that share a source row, a prompt, a passage or a template",
            null=_IN_0_1_0,
        ),
    ]
)

ROUTING = pa.schema(
    [
        _ROUTER,
        _SUITE,
        _TASK,
        _column("linear", pa.string(), "dotted module name of the linear; rows in model order"),
        _EXPERT,
        _column("share", pa.float64(), "this expert's share of all weight routed in the linear"),
        _column("tokens", pa.int64(), "tokens routed in scoring, without padding"),
        _column("entropy", pa.float64(), "entropy of the linear's shares over experts, in nats"),
    ]
)

_SCORE = pa.struct(
    [
        ("loglikelihood", pa.float64()),
        ("eos_loglikelihood", pa.float64()),
        ("tokens", pa.int64()),
        ("is_greedy", pa.bool_()),
        ("ends_greedy", pa.bool_()),
    ]
)

ANSWERS = pa.schema(
    [
        _column("key", pa.string(), "hash of all that determines the answers"),
        _column(
            "scores",
            pa.list_(pa.list_(_SCORE)),
            "per request, the score of each choice, or of the correct answer to generate",
        ),
        _column("texts", pa.list_(pa.binary()), "per request, the generated text, in UTF-8"),
        _column(
            "tokens",
            pa.int64(),
            "tokens run through the model; generated tokens are counted by their limit",
        ),
        _column("seconds", pa.float64(), "time the actors spent"),
        _column("cut", pa.list_(pa.int64()), "places of requests whose prompt was truncated"),
        _column(
            "failed",
            pa.list_(pa.struct([("place", pa.int64()), ("reason", pa.string())])),
            "requests that could not be answered, and why",
        ),
        _column("linears", pa.list_(pa.string()), "linears that routed tokens, in model order"),
        _column("routed", pa.list_(pa.int64()), "tokens routed in each of these linears"),
        _column(
            "routing",
            pa.binary(),
            "summed routing weight per linear and expert: float64 [linear, expert]",
        ),
        _column("sha256", pa.string(), "hash of the row"),
    ]
)

TRAINING = pa.schema(
    [
        _EXPERT,
        _column("job", pa.string(), "id of the job that trained the expert"),
        _column("stage", pa.string(), "lora or gates"),
        _column(
            "split",
            pa.string(),
            "train, validation (held out of training), or evaluation (the task's evaluation split)",
        ),
        _column(
            "step", pa.int64(), "optimizer steps done; the evaluation at step 0 is before training"
        ),
        _column(
            "loss",
            pa.float64(),
            "mean negative log-likelihood per target token; for evaluation and validation, first "
            "averaged per document",
        ),
        _column(
            "exact_match",
            pa.float64(),
            "share of greedy answers that match exactly",
            null="not measured",
        ),
        _column("lr", pa.float64(), "learning rate of the step", null="not a training step"),
        _column("tokens", pa.int64(), "tokens processed so far in the stage"),
        _column("seconds", pa.float64(), "time spent so far in the stage"),
    ]
)

EVALUATIONS = pa.schema(
    [
        _ROUTER,
        _SUITE,
        _column("state", pa.string(), "asking, scoring, done or failed"),
        _column("shards", pa.int64(), "shards of requests to answer"),
        _column("answered", pa.int64(), "how many of them have an answer"),
        _column("tokens", pa.int64(), "tokens run through the model in this call of the run"),
        _column("seconds", pa.float64(), "time the actors spent in this call of the run"),
        _column("errors", pa.list_(pa.string()), "why it, or one of its tasks, has no score"),
        _column("traceback", pa.string(), "traceback of the last error", null="no error"),
    ]
)

JOBS = pa.schema(
    [
        _EXPERT,
        _column("job", pa.string(), "id of the job that trains the expert"),
        _column("state", pa.string(), "waiting, running, done or failed"),
        _column("tokens", pa.int64(), "tokens it trains on in all steps, estimated from a sample"),
        _column("steps", pa.int64(), "optimizer steps it takes"),
        _column("starts", pa.int32(), "how often an actor started the job in this call"),
        _column("node", pa.string(), "id of the last node it ran on", null="not started"),
        _column("address", pa.string(), "address of that node", null="not started"),
        _column("process", pa.int64(), "process id of the actor there", null="not started"),
        _column("micro_batch_size", pa.int32(), "current number of sequences per forward pass"),
        _column("lr", pa.float64(), "current learning rate of its first stage"),
        _column(
            "seconds",
            pa.float64(),
            "time since its last start, or total time if done",
            null="waiting",
        ),
        _column("errors", pa.list_(pa.string()), "why it was restarted or failed"),
        _column("traceback", pa.string(), "traceback of the last error", null="no error"),
    ]
)


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
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, schema=schema), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


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
    try:
        # Without Arrow's threads: a short process that exits while they end is aborted.
        file = pq.ParquetFile(pa.BufferReader(folder.read(name)))
        table = file.read(columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise PhatgooseError(
            f"{folder}/{name} is damaged ({type(error).__name__}). Delete it and run again."
        ) from error
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    for place, field in enumerate(schema):
        if field.name not in table.schema.names and field.nullable:  # written by an earlier version
            nothing = pa.nulls(len(table), field.type)
            table = table.add_column(min(place, table.num_columns), field, nothing)
    if not table.schema.equals(schema):
        raise PhatgooseError(
            f"{folder}/{name} has different columns than this version writes. "
            "Delete it and run again, or use a new run.dir."
        )
    return table


def read_folder(folder: Folder, prefix: str, schema: pa.Schema) -> pa.Table:
    """Read all parquet files below `prefix` (samples, routing or training) as one table.

    A missing or empty folder gives a table without rows.

    Raises:
        PhatgooseError: as in `read_table`.
    """
    names = [name for name in folder.names(f"{prefix}/") if name.endswith(".parquet")]
    tables = [read_table(folder, name, schema) for name in names]
    return pa.concat_tables([schema.empty_table(), *tables])


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
