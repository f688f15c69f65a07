"""The stage `evaluate`: every router on every task of the suite, through lm-eval.

lm-eval ──requests──► ShardedLM ──chunks──► journal, else evaluation actors
   │ acc, acc_norm, exact_match                 │ full scores of every choice
   └──────────────► scores.parquet, samples/ ◄──┘ acc_paper, nll; routing/
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from lm_eval import evaluator

from harness import results
from harness.documents import Documents, score_rows
from harness.jobs import Failure, Workers
from harness.journal import Answer, Chunk, Journal
from harness.lm import ShardedLM, Usage
from harness.storage import Folder
from harness.summary import BEST_INDIVIDUAL, ORACLE, best_individual_rows, oracle_rows
from harness.tasks import TaskData, describe
from harness.tasks.lm_eval_tasks import make_task
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router, all_needs
from phatgoose.routers.interface import side_information

# Draws for the errors of metrics that are no means; lm-eval is not to fork this process for them.
_BOOTSTRAPS = 200
os.environ.setdefault("DISABLE_MULTIPROC", "1")
# Raise it whenever the same chunk would be answered differently than before.
_ANSWER_VERSION = 4


@dataclass(frozen=True)
class _Call:
    """A chunk to be answered under a router; `key` names its answer in the journal."""

    key: str
    name: str
    router: Router
    chunk: Chunk


class Evaluation:
    """Evaluates routers one after the other.

    Args:
        folder: the run folder.
        suite: its name.
        tasks: its tasks' data.
        common: the columns `run`, `base` and `manifest` of every score.
        dtype: of the base in memory.
        experts: the pool's experts, in its order.
        workers: evaluation actors, started at the first chunk that the journal does not answer.
        chunk_characters: see `harness.journal.cut`.
        advance: told how many requests were just answered.
        identities: by a router's name, what determines its answers besides the pool and itself.
    """

    def __init__(
        self,
        folder: Folder,
        suite: str,
        tasks: Sequence[TaskData],
        common: Mapping[str, str],
        dtype: str,
        experts: Sequence[str],
        workers: Workers,
        chunk_characters: int,
        advance: Callable[[int], None],
        identities: Mapping[str, Sequence[str]],
    ) -> None:
        self._folder, self._suite, self._common = folder, suite, common
        self._experts, self._workers = experts, workers
        self._journal = Journal(folder)
        self._identity = [_ANSWER_VERSION, common["manifest"], common["base"], dtype]
        self._characters, self._advance = chunk_characters, advance
        self._chunks: dict[Chunk, None] = {}  # all that was asked so far, in order
        self._counted: set[str] = set()
        self._identities = identities
        self._descriptions = {f"{suite}/{data.name}": describe(data) for data in tasks}
        self._tasks = {f"{suite}/{data.name}": make_task(data, suite) for data in tasks}
        self._asked = {f"{suite}/{data.name}": Documents.of(data) for data in tasks}

    def run(self, name: str, router: Router) -> list[dict[str, Any]]:
        """Evaluate one router: writes its samples and routing, returns its rows of scores."""

        def ask(chunks: Sequence[Chunk]) -> Iterator[tuple[int, Answer]]:
            return self._ask(name, router, chunks)

        right = {name: self._right(name) for name in self._tasks}
        lm = ShardedLM(ask, self._characters, right)
        quiet = io.StringIO()  # lm-eval draws a bar per task, and prints
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            output = evaluator.evaluate(
                lm,
                {"tasks": self._tasks, "groups": {}},
                samples={name: list(range(len(d.rows))) for name, d in self._asked.items()},
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=True,
            )
        assert output is not None
        scores: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        routing: list[dict[str, Any]] = []
        for full_name in self._tasks:
            labels = {"router": name, "suite": self._suite, "task": full_name.partition("/")[2]}
            asked = self._asked[full_name]
            documents = asked.answered(output["samples"][full_name], lm.scores, full_name)
            samples += [{**labels, **document} for document in documents]
            shared = {
                **labels,
                **self._common,
                "top_k": _options(router).get("top_k"),
                "options": json.dumps({"kind": type(router).name(), **_options(router)}),
                "zero_shot": router.zero_shot,
                "side_information": side_information(router),
                "documents": asked.fingerprint,
                "n": len(documents),
                "seconds": lm.usage[full_name].seconds,
                "tokens": lm.usage[full_name].tokens,
                "expert": None,
            }
            scores += [
                {**shared, **row} for row in score_rows(output["results"][full_name], documents)
            ]
            routing += [{**labels, **row} for row in self._routing(lm.usage[full_name])]
        self._replace(results.samples_file(name), results.SAMPLES, samples)
        if routing:
            self._replace(results.routing_file(name), results.ROUTING, routing)
        return scores

    def write_scores(self, rows: list[dict[str, Any]], derived: Collection[str] = ()) -> None:
        """Write scores.parquet, keeping what was measured before and can be compared with it.

        That is what other suites, and other routers on the same documents, got with this pool.
        `derived` are the routers to read off from the single experts' rows.
        """
        table = pa.Table.from_pylist(rows, results.SCORES)
        if ORACLE in derived:
            rows = rows + oracle_rows(table)
        if BEST_INDIVIDUAL in derived:
            rows = rows + best_individual_rows(table)
        routers = {row["router"] for row in rows}
        documents = {(row["task"], row["documents"]) for row in rows}
        kept = [
            row
            for row in _read(self._folder, results.SCORES_FILE, results.SCORES)
            if row["manifest"] == self._common["manifest"]
            and (
                row["suite"] != self._suite
                or (row["router"] not in routers and (row["task"], row["documents"]) in documents)
            )
        ]
        results.write_table(self._folder, results.SCORES_FILE, results.SCORES, kept + rows)

    def _right(self, name: str) -> list[str]:
        """The right answer of each document of a task, as it follows the prompt."""
        delimiter = self._tasks[name].config.target_delimiter
        return [delimiter + row["targets"][0] for row in self._asked[name].rows]

    def _ask(
        self, name: str, router: Router, chunks: Sequence[Chunk]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers from the journal, then from the actors; each is kept before it is used."""
        keys = [self._key(name, router, chunk) for chunk in chunks]
        self._chunks |= dict.fromkeys(chunks)
        missing = [i for i, key in enumerate(keys) if not self._journal.has(key)]
        calls = [_Call(keys[i], name, router, chunks[i]) for i in missing]
        for call, answer in self._answer(calls):
            yield missing[call], answer
        for index in sorted(set(range(len(chunks))) - set(missing)):
            yield index, self._journal.read(keys[index])
            self._count(keys[index], chunks[index])

    def ask_ahead(self, routers: Mapping[str, Router]) -> None:
        """Let the actors answer, for these routers, all that other routers were asked before.

        Requests do not depend on the router. Asking them all at once leaves no actor idle while
        lm-eval sums up one router and prepares the next; lm-eval then finds the answers in the
        journal.
        """
        calls = [
            _Call(self._key(name, router, chunk), name, router, chunk)
            for name, router in routers.items()
            for chunk in self._chunks
        ]
        for _ in self._answer([call for call in calls if not self._journal.has(call.key)]):
            pass

    def _answer(self, calls: "Sequence[_Call]") -> Iterator[tuple[int, Answer]]:
        """Let the actors answer; every answer is in the journal before it is yielded."""
        arguments = [
            (call.router, call.chunk, self._descriptions[call.chunk.task]) for call in calls
        ]
        for index, result in self._workers.run("answer", arguments, tick=lambda _: None):
            call = calls[index]
            if isinstance(result, Failure):
                raise PhatgooseError(
                    f"router {call.name}, task {call.chunk.task}: {result.error}; see logs/ in "
                    f"{self._folder}"
                )
            self._journal.write(call.key, result)
            self._count(call.key, call.chunk)
            yield index, result

    def _key(self, name: str, router: Router, chunk: Chunk) -> str:
        own = [type(router).__name__, _options(router), *self._identities.get(name, ())]
        if "descriptions" in all_needs(router):
            own.append(self._descriptions[chunk.task])
        return chunk.key([*self._identity, *own])

    def _count(self, key: str, chunk: Chunk) -> None:
        """Advance the bar, once per chunk and router."""
        if key not in self._counted:
            self._counted.add(key)
            self._advance(len(chunk.requests))

    def _routing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        for linear, weights_E in usage.routing.items():
            shares = (weights_E / weights_E.sum()).tolist()
            entropy = -sum(share * math.log(share) for share in shares if share > 0)
            for expert, share in zip(self._experts, shares, strict=True):
                yield {
                    "linear": linear,
                    "expert": expert,
                    "share": share,
                    "tokens": usage.routed[linear],
                    "entropy": entropy,
                }

    def _replace(self, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
        """Write a router's rows of this suite, keeping its rows of others."""
        kept = [r for r in _read(self._folder, name, schema) if r["suite"] != self._suite]
        results.write_table(self._folder, name, schema, kept + rows)


def _options(router: Router) -> dict[str, Any]:
    """A router's options by name."""
    return asdict(router)  # type: ignore[call-overload]  # a dataclass, as all routers are


def _read(folder: Folder, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    if not folder.exists(name):
        return []
    rows = results.read_table(folder, name, schema).to_pylist()
    return [{**row, "metrics": dict(row["metrics"])} if "metrics" in row else row for row in rows]
