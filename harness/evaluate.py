"""The stage `evaluate`: every router on every task of the suite, through lm-eval.

lm-eval ──requests──► ShardedLM ──chunks──► journal, else evaluation actors
   │ acc, acc_norm, exact_match                 │ full scores of every choice
   └──────────────► scores.parquet, samples/ ◄──┘ acc_paper, nll; routing/
"""

import contextlib
import functools
import io
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from lm_eval import evaluator

from harness import results
from harness.documents import Documents, score_rows
from harness.jobs import TICK_SECONDS, Failure, Workers
from harness.journal import Answer, Chunk, Journal
from harness.lm import ShardedLM, Usage, list_chunks
from harness.pack import Members, pool_id
from harness.plan import needs_profiles
from harness.storage import Folder
from harness.summary import BEST_INDIVIDUAL, ORACLE, best_individual_rows, oracle_rows
from harness.tasks import TaskData, describe
from harness.tasks.lm_eval_tasks import make_task
from phatgoose.errors import PhatgooseError
from phatgoose.pool import known_expert
from phatgoose.routers import Router, all_needs
from phatgoose.routers.interface import side_information
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.single import Single

# Draws for the errors of metrics that are no means; lm-eval is not to fork this process for them.
_BOOTSTRAPS = 200
os.environ.setdefault("DISABLE_MULTIPROC", "1")
# Raise it whenever the same chunk would be answered differently than before.
_ANSWER_VERSION = 6


@dataclass(frozen=True)
class _Call:
    """A chunk to be answered under a router; `key` names its answer in the journal."""

    key: str
    name: str
    router: Router
    chunk: Chunk


@dataclass(frozen=True)
class Setting:
    """What all evaluations of a run have in common.

    Attributes:
        folder: the run folder.
        run, base, dtype: the run's name, and the base's name and dtype.
        workers: evaluation actors.
        chunk_characters: see `harness.journal.cut`.
    """

    folder: Folder
    run: str
    base: str
    dtype: str
    workers: Workers
    chunk_characters: int


class Evaluation:
    """Evaluates routers over one pool on one suite.

    Args:
        setting: what all evaluations have in common.
        suite: its name.
        tasks: its tasks' data.
        members: the pool's experts, in its order, and their profiles if a router looks at them.
        others: content hashes of experts outside the pool, by name.
    """

    def __init__(
        self,
        setting: Setting,
        suite: str,
        tasks: Sequence[TaskData],
        members: Members,
        others: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._workers = setting.folder, setting.workers
        self._suite, self._members, self._others = suite, members, others or {}
        self._manifest = pool_id(members.experts)
        self._common = {"run": setting.run, "base": setting.base, "manifest": self._manifest}
        self._journal = Journal(setting.folder)
        self._identity = [_ANSWER_VERSION, setting.base, setting.dtype]
        self._characters = setting.chunk_characters
        self.answered = 0  # chunks, by actors
        self.requests = 0  # answered, or found in the journal
        self.failures: dict[str, str] = {}  # of routers that an actor could not answer under
        self._counted: set[str] = set()
        self._found = self._journal.keys()  # answered by an earlier call
        self._known = set(self._found)  # answered, or asked
        self._waiting: dict[int, _Call] = {}  # what the actors were asked, by the call's key
        self._descriptions = {f"{suite}/{data.name}": describe(data) for data in tasks}
        self._tasks = {f"{suite}/{data.name}": make_task(data, suite) for data in tasks}
        self._asked = {f"{suite}/{data.name}": Documents.of(data) for data in tasks}

    @functools.cached_property
    def chunks(self) -> list[Chunk]:
        """All chunks that lm-eval will ask under any router; nothing is answered for it."""
        right = {name: self._right(name) for name in self._tasks}
        with _quiet():
            return list_chunks(self._tasks, self._asked_samples, self._characters, right)

    def run(self, name: str, router: Router) -> list[dict[str, Any]]:
        """Evaluate one router: writes its samples and routing, returns its rows of scores."""

        def ask(chunks: Sequence[Chunk]) -> Iterator[tuple[int, Answer]]:
            return self._ask(name, router, chunks)

        right = {name: self._right(name) for name in self._tasks}
        lm = ShardedLM(ask, self._characters, right)
        with _quiet():
            output = evaluator.evaluate(
                lm,
                {"tasks": self._tasks, "groups": {}},
                samples=self._asked_samples,
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
                "cut": sum(task == full_name for task, _ in lm.cut),
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
            if row["manifest"] == self._manifest
            and (
                row["suite"] != self._suite
                or (row["router"] not in routers and (row["task"], row["documents"]) in documents)
            )
        ]
        # The same order, whatever was measured first.
        ordered = sorted(kept + rows, key=lambda row: row["suite"])
        results.write_table(self._folder, results.SCORES_FILE, results.SCORES, ordered)

    @property
    def _asked_samples(self) -> dict[str, list[int]]:
        return {name: list(range(len(asked.rows))) for name, asked in self._asked.items()}

    def _right(self, name: str) -> list[str]:
        """The right answer of each document of a task, as it follows the prompt."""
        delimiter = self._tasks[name].config.target_delimiter
        return [delimiter + row["targets"][0] for row in self._asked[name].rows]

    def _ask(
        self, name: str, router: Router, chunks: Sequence[Chunk]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers from the journal; what it lacks is asked before."""
        keys = [self._key(name, router, chunk) for chunk in chunks]
        self._add([_Call(k, name, router, c) for k, c in zip(keys, chunks, strict=True)])
        while name in self.open_routers:
            self.step(TICK_SECONDS)
        if name in self.failures:
            raise PhatgooseError(self.failures[name])
        for index, key in enumerate(keys):
            yield index, self._journal.read(key)
            self._count(key, chunks[index])

    def ask(self, routers: Mapping[str, Router]) -> None:
        """Let the actors answer every chunk under these routers, router by router.

        Requests do not depend on the router, so that no actor need idle while lm-eval sums up one
        router and prepares the next; lm-eval finds the answers in the journal. `step` takes them
        in.
        """
        for name, router in routers.items():
            self._add([_Call(self._key(name, router, c), name, router, c) for c in self.chunks])

    @property
    def is_waiting(self) -> bool:
        """Whether answers are still awaited."""
        return bool(self._waiting)

    @property
    def open_routers(self) -> set[str]:
        """The routers that answers are still awaited of."""
        return {call.name for call in self._waiting.values()}

    def step(self, timeout: float) -> None:
        """Take in answers that came within `timeout` seconds."""
        for key, result in self._workers.step(timeout):
            self.take(key, result)

    def awaits(self, key: int) -> bool:
        """Whether the actors' call of this key is one of this evaluation's."""
        return key in self._waiting

    def take(self, key: int, result: Any) -> None:
        """Keep what an actor answered in the journal, or note that its router failed."""
        call = self._waiting.pop(key)
        if isinstance(result, Failure):
            self.failures.setdefault(
                call.name,
                f"router {call.name}, task {call.chunk.task}: {result.error}; see logs/ in "
                f"{self._folder}",
            )
            return
        self._journal.write(call.key, result)
        self.answered += 1
        self._count(call.key, call.chunk)

    def _add(self, calls: Sequence[_Call]) -> None:
        """Ask the actors what the journal does not know and they were not asked before."""
        for call in calls:
            if call.key in self._found:
                self._count(call.key, call.chunk)
        calls = [c for c in calls if c.key not in self._known]
        self._known.update(call.key for call in calls)
        arguments = [
            (c.router, c.chunk, self._descriptions[c.chunk.task], self._members_of(c.router))
            for c in calls
        ]
        keys = self._workers.add("answer", arguments)
        self._waiting |= zip(keys, calls, strict=True)

    def _members_of(self, router: Router) -> Members:
        """The experts that a router's actor has to have: all, or the only one that it is about.

        Of no expert there is no pool, so the base has any one: it does not count.
        """
        if isinstance(router, NoExpert):
            return Members(dict([next(iter(self._members.experts.items()))]))
        if isinstance(router, Single):
            known = {**self._members.experts, **self._others}
            return Members({router.expert: known[known_expert(router.expert, list(known))]})
        if needs_profiles([router]):
            return self._members
        return Members(self._members.experts)

    def _key(self, name: str, router: Router, chunk: Chunk) -> str:
        """What determines an answer: no other expert has a part in that of a single one."""
        members = self._members_of(router)
        pool = "" if isinstance(router, NoExpert) else pool_id(members.experts)
        own = [type(router).__name__, _options(router), *(members.profiles or {}).values()]
        if "descriptions" in all_needs(router):
            own.append(self._descriptions[chunk.task])
        return chunk.key([*self._identity, pool, *own])

    def _count(self, key: str, chunk: Chunk) -> None:
        """Tell of an answer, once per chunk and router."""
        if key not in self._counted:
            self._counted.add(key)
            self.requests += len(chunk.requests)

    def _routing(self, usage: Usage) -> Iterator[dict[str, Any]]:
        for linear, weights_E in usage.routing.items():
            shares = (weights_E / weights_E.sum()).tolist()
            entropy = -sum(share * math.log(share) for share in shares if share > 0)
            for expert, share in zip(self._members.experts, shares, strict=True):
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
        ordered = sorted(kept + rows, key=lambda row: row["suite"])
        results.write_table(self._folder, name, schema, ordered)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval draws, a bar per task, and prints."""
    nowhere = io.StringIO()
    with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def _options(router: Router) -> dict[str, Any]:
    """A router's options by name."""
    return asdict(router)  # type: ignore[call-overload]  # a dataclass, as all routers are


def _read(folder: Folder, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    if not folder.exists(name):
        return []
    rows = results.read_table(folder, name, schema).to_pylist()
    return [{**row, "metrics": dict(row["metrics"])} if "metrics" in row else row for row in rows]
