"""The schemas of a run folder's parquet files, and the meaning of every column.

The meaning is stored in the files, too, as the metadata `meaning` of the field.
"""

import pyarrow as pa


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
        _column("task", pa.string(), "suite and name of the evaluation task"),
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
