"""Turn a router's answers into scores, samples and routing: what lm-eval does, in an actor.

Shape suffixes: L linears, E experts.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from harness import run_folder
from harness.evaluation.answer_files import AnswerFiles, DamagedAnswer, task_key
from harness.evaluation.answers import Answer, joined
from harness.evaluation.requests import SuiteRequests, TaskRequests
from harness.evaluation.scores import Row, delete_marker, write_marker
from harness.evaluation.shards import Shard
from harness.evaluation.task_scores import score_task
from harness.scheduling.actor import Actor, log_to_run_folder
from harness.storage import Folder
from harness.tasks import TaskData
from phatgoose.errors import PhatgooseError, reason_of

_LOG = logging.getLogger(__name__)
# The next router asks for the same tasks. So many documents take about 1.5 GiB.
_KEPT_DOCUMENTS = 100_000


@dataclass(frozen=True)
class ScoredTask:
    """A task to score.

    Attributes:
        data: the task's data. Its requests are built where it is scored, since lm-eval's tasks
            depend on files and modules of a process.
        result_of: hashes of the requests, see `SuiteRequests.note`.
        shards: how its requests were asked.
        keys: the key of the answer to each shard.
    """

    data: TaskData
    result_of: Mapping[str, str]
    shards: list[Shard]
    keys: list[str]

    @property
    def result(self) -> str:
        """A hash of what determines its scores: the answers, requests and correct answers."""
        return result_key(self.key, self.result_of)

    @property
    def key(self) -> str:
        """The key of the task's answer."""
        return task_key(self.keys)


@dataclass(frozen=True)
class ToScore:
    """A router to score on a suite.

    Attributes:
        folder: the run folder.
        router, suite: their names.
        experts: the names of the pool's experts, in its order.
        columns: the values of the columns of scores.parquet that all its rows share.
        tasks: the tasks, by name.
    """

    folder: Folder
    router: str
    suite: str
    experts: list[str]
    columns: Row
    tasks: dict[str, ScoredTask]


@dataclass
class Scored:
    """What came of it.

    Attributes:
        rows: rows of scores.parquet.
        unanswered: why tasks were left out, by name: some of their requests failed.
        damaged: the keys of shards to ask again, by message. If there are any, nothing was scored.
    """

    rows: list[Row] = field(default_factory=list)
    unanswered: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


class ScoringActor(Actor):
    """An actor that scores routers.

    Args:
        run_dir: the run folder, for the log.
        code: the driver's `code_version`.
    """

    def __init__(self, run_dir: str, code: str) -> None:
        log_to_run_folder(run_dir, "score")
        super().__init__(code)
        self._built: dict[str, tuple[Mapping[str, str], SuiteRequests]] = {}
        self._documents: dict[str, int] = {}  # of each task in `_built`

    def score(self, asked: ToScore) -> Scored:
        """Score a router; write its samples and routing, and compact its answers."""
        files = AnswerFiles(asked.folder)
        answers, damaged = self._read(files, asked)
        if damaged:
            return Scored(damaged=damaged)
        scored = Scored()
        samples: list[Row] = []
        routing: list[pa.Table] = []
        for name, task in asked.tasks.items():
            labels = {"router": asked.router, "suite": asked.suite, "task": bare_name(name)}
            answer = answers[name]
            if answer.failed:
                first, *_ = answer.failed.values()
                scored.unanswered[name] = (
                    f"{len(answer.failed)} of {len(answer.texts)} requests could not be answered "
                    f"({first}), so there is no score; the other answers are kept"
                )
                continue
            try:
                requests = self._requests_of(name, asked.suite, task)
                rows, documents = score_task(name, requests, task.shards, answer)
            except Exception as error:  # a task's own code may raise anything
                _LOG.exception("task %s cannot be scored", name)
                scored.unanswered[name] = f"it cannot be scored ({reason_of(error)})"
                continue
            shared = {**labels, **asked.columns, "answers": task.result}
            scored.rows += [{**shared, **row} for row in rows]
            samples += [{**labels, **document} for document in documents]
            if answer.routing:
                routing.append(_routing(labels, answer, asked.experts))
            self._beat()
        delete_marker(asked.folder, asked.suite, asked.router)
        _write(asked, samples, routing)
        complete = [name for name, answer in answers.items() if not answer.failed]
        files.compact(
            asked.suite,
            asked.router,
            {name: (asked.tasks[name].key, answers[name]) for name in complete},
            [key for name in complete for key in asked.tasks[name].keys],
        )
        results = {name: asked.tasks[name].result for name in complete}
        write_marker(asked.folder, asked.suite, asked.router, results, bool(routing))
        return scored

    def _requests_of(self, name: str, suite: str, task: ScoredTask) -> TaskRequests:
        """Return a task's requests, from those that this actor has built for another router."""
        if name not in self._built or self._built[name][0] != task.result_of:
            self._built[name] = task.result_of, SuiteRequests(suite, [task.data])
        requests = self._built[name][1]
        if requests.note(name) != task.result_of:
            raise PhatgooseError(
                f"task {name}: its requests were built differently in this process. Seed what its "
                "definition draws, or leave it out of the suite."
            )
        built = requests.tasks[name]
        self._documents[name] = len(built.documents.rows)
        while len(self._documents) > 1 and sum(self._documents.values()) > _KEPT_DOCUMENTS:
            oldest = next(one for one in self._documents if one != name)
            del self._documents[oldest], self._built[oldest]
        return built

    def _read(self, files: AnswerFiles, asked: ToScore) -> tuple[dict[str, Answer], dict[str, str]]:
        """Return the answer to each task, and why shards have none, by key."""
        keys = {task.key for task in asked.tasks.values()}
        compact = files.read_tasks(asked.suite, asked.router, keys)
        answers, damaged = {}, {}
        for name, task in asked.tasks.items():
            if task.key in compact:
                answers[name] = compact[task.key]
                continue
            parts = []
            for key in task.keys:
                try:
                    parts.append(files.read(key))
                except DamagedAnswer as error:
                    damaged[key] = str(error)
                self._beat()
            answers[name] = joined(parts)
        return answers, damaged


def result_key(key: str, result_of: Mapping[str, str]) -> str:
    """Return a hash of a task's answers and requests, with the correct answers."""
    text = json.dumps([key, sorted(result_of.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def bare_name(task: str) -> str:
    """Return a task's name without that of its suite."""
    return task.partition("/")[2]


def _routing(labels: Row, answer: Answer, experts: Sequence[str]) -> pa.Table:
    """Return a task's rows of routing: linear by linear, expert by expert."""
    linears, L, E = list(answer.routing), len(answer.routing), len(experts)
    weights_LE = np.stack([answer.routing[linear].numpy() for linear in linears])
    shares_LE = weights_LE / weights_LE.sum(1, keepdims=True)
    logs_LE = np.log(shares_LE, where=shares_LE > 0, out=np.zeros_like(shares_LE))
    entropies_L = -(shares_LE * logs_LE).sum(1)
    tokens_L = np.array([answer.routed[linear] for linear in linears])
    columns = {name: pa.repeat(pa.scalar(value), L * E) for name, value in labels.items()} | {
        "linear": pa.array(linears).take(pa.array(np.repeat(np.arange(L), E))),
        "expert": pa.array(experts).take(pa.array(np.tile(np.arange(E), L))),
        "share": pa.array(shares_LE.ravel()),
        "tokens": pa.array(np.repeat(tokens_L, E)),
        "entropy": pa.array(np.repeat(entropies_L, E)),
    }
    return pa.table([columns[name] for name in run_folder.ROUTING.names], run_folder.ROUTING)


def _write(asked: ToScore, samples: list[Row], routing: list[pa.Table]) -> None:
    """Replace the router's samples and routing of this suite."""
    named = asked.suite, asked.router
    samples_file, routing_file = run_folder.samples_file(*named), run_folder.routing_file(*named)
    if samples:
        run_folder.write_table(asked.folder, samples_file, run_folder.SAMPLES, samples)
    else:
        asked.folder.delete(samples_file, missing_ok=True)
    if routing:
        run_folder.write_arrow(asked.folder, routing_file, pa.concat_tables(routing))
    else:
        asked.folder.delete(routing_file, missing_ok=True)
