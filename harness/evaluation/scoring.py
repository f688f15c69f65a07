"""Turn a router's answers into scores, samples and routing: what lm-eval does, in an actor.

Shape suffixes: L linears, E experts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from lm_eval import evaluator

from harness import run_folder
from harness.evaluation.answer_files import AnswerFiles, DamagedAnswer, task_key
from harness.evaluation.answers import Answer, joined
from harness.evaluation.documents import score_rows
from harness.evaluation.lm import RecordedLM, quiet
from harness.evaluation.requests import TaskRequests
from harness.evaluation.scores import Row
from harness.evaluation.shards import Shard
from harness.scheduling.actor import Actor, log_to_run_folder
from harness.storage import Folder

# Draws for the standard errors of metrics that are not means. lm-eval must not fork for them.
_BOOTSTRAPS = 200
os.environ.setdefault("DISABLE_MULTIPROC", "1")


@dataclass(frozen=True)
class ScoredTask:
    """A task to score.

    Attributes:
        requests: the task's `TaskRequests`, or Ray's reference to them.
        shards: how its requests were asked.
        keys: the key of the answer to each shard.
    """

    requests: Any
    shards: list[Shard]
    keys: list[str]

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

    def score(self, asked: ToScore) -> Scored:
        """Score a router; write its samples and routing, and compact its answers."""
        files = AnswerFiles(asked.folder)
        answers, damaged = _read(files, asked)
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
            rows, documents = _score_task(name, task, answer)
            shared = {**labels, **asked.columns, "answers": task.key}
            scored.rows += [{**shared, **row} for row in rows]
            samples += [{**labels, **document} for document in documents]
            if answer.routing:
                routing.append(_routing(labels, answer, asked.experts))
            self._beat()
        _write(asked, samples, routing)
        complete = [name for name, answer in answers.items() if not answer.failed]
        files.compact(
            asked.suite,
            asked.router,
            {name: (asked.tasks[name].key, answers[name]) for name in complete},
            [key for name in complete for key in asked.tasks[name].keys],
        )
        return scored


def bare_name(task: str) -> str:
    """Return a task's name without that of its suite."""
    return task.partition("/")[2]


def _read(files: AnswerFiles, asked: ToScore) -> tuple[dict[str, Answer], dict[str, str]]:
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
        answers[name] = joined(parts)
    return answers, damaged


def _score_task(name: str, asked: ScoredTask, answer: Answer) -> tuple[list[Row], list[Row]]:
    """Return a task's rows of scores and of samples."""
    requests: TaskRequests = _resolved(asked.requests)
    task = requests.task
    lm = RecordedLM(asked.shards, answer, requests.targets)

    def build_all_requests(**_: Any) -> None:
        """Use copies of the requests that were asked, without answers of earlier calls."""
        task._instances = [replace(one, resps=[], filtered_resps={}) for one in requests.instances]

    task.build_all_requests = build_all_requests
    places: Any = range(len(requests.documents.rows))  # lm-eval looks each place up in it
    with quiet():
        output = evaluator.evaluate(
            lm,
            {"tasks": {name: task}, "groups": {}},
            samples={name: places},
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
        )
    assert output is not None
    documents = requests.documents.answered(output["samples"][name], lm.scores)
    shared = {
        "documents": requests.fingerprint,
        "n": len(documents),
        "cut": len(lm.cut),
        "seconds": answer.seconds,
        "tokens": answer.tokens,
        "expert": None,
    }
    return [{**shared, **row} for row in score_rows(output["results"][name], documents)], documents


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


def _resolved(reference: Any) -> Any:
    """Return the object that a reference stands for."""
    return ray.get(reference) if isinstance(reference, ray.ObjectRef) else reference
