"""The stage `evaluate`: every router on every task of the suite, through lm-eval.

lm-eval ──requests──► ShardedLM ──chunks──► journal, else evaluation actors
   │ acc, acc_norm, exact_match                 │ full scores of every choice
   └──────────────► scores.parquet, samples/ ◄──┘ acc_paper, nll; routing/
"""

import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from lm_eval import evaluator

from harness import run_folder
from harness.evaluation.chunks import Answer, Chunk
from harness.evaluation.conditions import Conditions, library_versions, scoring_code
from harness.evaluation.derived import best_individual_rows, oracle_rows
from harness.evaluation.documents import score_rows
from harness.evaluation.journal import DamagedAnswer, Journal
from harness.evaluation.lm import ShardedLM, Usage, quiet
from harness.evaluation.requests import SuiteRequests
from harness.extra_routers import BEST_INDIVIDUAL, ORACLE
from harness.registry.packs import Members, pool_id
from harness.scheduling.workers import TICK_SECONDS, Failure, Workers
from harness.source_code import METRICS, Code, changes, code_of, digest, router_code
from harness.storage import Folder
from phatgoose.errors import PhatgooseError, listed
from phatgoose.pool import known_expert
from phatgoose.routers import Router, all_needs
from phatgoose.routers.interface import needs_profiles, side_information
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.single import Single

_LOG = logging.getLogger(__name__)
# Draws for the standard errors of metrics that are not means. lm-eval must not fork for them.
_BOOTSTRAPS = 200
os.environ.setdefault("DISABLE_MULTIPROC", "1")


@dataclass(frozen=True)
class _RoutedChunk:
    """A chunk to answer under a router. `key` names the answer in the journal."""

    key: str
    name: str
    router: Router
    chunk: Chunk


@dataclass(frozen=True)
class Setting:
    """The settings that all evaluations of a run share.

    Attributes:
        folder: the run folder. The run has its name.
        base: the base's name.
        conditions: the conditions of the answers.
        workers: the evaluation actors.
        chunk_characters: see `harness.evaluation.chunks.cut`.
    """

    folder: Folder
    base: str
    conditions: Conditions
    workers: Workers
    chunk_characters: int


class Evaluation:
    """The evaluation of routers over one pool on one suite.

    Args:
        setting: the settings that all evaluations of the run share.
        requests: the suite's requests.
        members: the pool's experts, in its order, and their profiles if a router uses them.
        others: content hashes of experts outside the pool, by name.
    """

    def __init__(
        self,
        setting: Setting,
        requests: SuiteRequests,
        members: Members,
        others: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._workers = setting.folder, setting.workers
        self._requests, self._suite = requests, requests.suite
        self._members, self._others = members, others or {}
        self._conditions = setting.conditions
        self._manifest = pool_id(members.experts)
        self._common = {
            "run": PurePosixPath(str(setting.folder)).name,
            "base": setting.base,
            "manifest": self._manifest,
            "dtype": setting.conditions.dtype,
            "device": setting.conditions.device,
            # lm-eval and this project's code compute metrics from answers.
            "versions": library_versions("lm_eval"),
            "code": digest({**scoring_code(), **code_of(METRICS)}),
        }
        self._journal = Journal(setting.folder)
        self.chunks = requests.chunks(setting.chunk_characters)
        self._characters = setting.chunk_characters
        self.answered = 0  # chunks, by actors
        self.requests = 0  # answered, or found in the journal
        self.failures: dict[str, str] = {}  # why no actor could answer, by router
        self._counted: set[str] = set()
        self._found = self._journal.keys()  # answered by an earlier call
        self._known = set(self._found)  # answered or asked
        self._waiting: dict[int, _RoutedChunk] = {}  # the actors' open calls, by key
        self._codes: dict[str, Code] = {}

    def run(self, name: str, router: Router) -> list[dict[str, Any]]:
        """Evaluate one router, write its samples and routing, and return its rows of scores."""
        answers = self._answers(name, router)

        def ask(chunks: Sequence[Chunk]) -> Iterator[tuple[int, Answer]]:
            for index, chunk in enumerate(chunks):
                yield index, answers[chunk]

        lm = ShardedLM(ask, self._characters, self._requests.targets)
        with quiet():
            output = evaluator.evaluate(
                lm,
                {"tasks": self._requests.lm_eval_tasks, "groups": {}},
                samples=self._requests.samples,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=True,
            )
        assert output is not None
        scores: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        routing: list[dict[str, Any]] = []
        for full_name, asked in self._requests.tasks.items():
            labels = {"router": name, "suite": self._suite, "task": full_name.partition("/")[2]}
            logged = output["samples"][full_name]
            documents = asked.documents.answered(logged, lm.scores, full_name)
            samples += [{**labels, **document} for document in documents]
            shared = {
                **labels,
                **self._common,
                "router_code": digest(self._code(router)),
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
        self._replace(run_folder.samples_file(name), run_folder.SAMPLES, samples)
        if routing:
            self._replace(run_folder.routing_file(name), run_folder.ROUTING, routing)
        return scores

    def announce(self, routers: Mapping[str, Router]) -> None:
        """Log which routers are asked again, in one line per reason.

        What determines their answers is recorded in answers.json, and compared with the record of
        an earlier call of the run.
        """
        file = run_folder.ANSWERS_FILE
        noted = run_folder.read_json(self._folder, file) if self._folder.exists(file) else {}
        again: dict[str, dict[str, int]] = {}
        now = {}
        for name, router in routers.items():
            key = f"{self._suite}/{name}"
            now[key] = self._determining(router)
            before = noted.get(key)
            if not isinstance(before, dict) or not isinstance(before.get("code"), dict):
                before = now[key]  # nothing was recorded
            if reason := _what_changed(before, now[key]):
                lacking = sum(self._key(router, c) not in self._found for c in self.chunks)
                again.setdefault(reason, {})[name] = lacking
        for reason, counts in again.items():
            if chunks := sum(counts.values()):
                named = listed(list(counts))
                _LOG.warning("%s changed: %d chunks of %s are asked again", reason, chunks, named)
        if noted != {**noted, **now}:
            run_folder.write_json(self._folder, file, {**noted, **now})

    def write_scores(self, rows: list[dict[str, Any]], derived: Collection[str] = ()) -> None:
        """Write scores.parquet, and keep earlier rows that are comparable.

        These are the rows of other suites, and of other routers on the same documents, with this
        pool. `derived` are the routers to derive from the single experts' rows.
        """
        table = pa.Table.from_pylist(rows, run_folder.SCORES)
        if ORACLE in derived:
            rows = rows + oracle_rows(table)
        if BEST_INDIVIDUAL in derived:
            rows = rows + best_individual_rows(table)
        routers = {row["router"] for row in rows}
        documents = {(row["task"], row["documents"]) for row in rows}
        kept = [
            row
            for row in _read(self._folder, run_folder.SCORES_FILE, run_folder.SCORES)
            if row["manifest"] == self._manifest
            and (
                row["suite"] != self._suite
                or (row["router"] not in routers and (row["task"], row["documents"]) in documents)
            )
        ]
        # The order does not depend on which suite was measured first.
        ordered = sorted(kept + rows, key=lambda row: row["suite"])
        run_folder.write_table(self._folder, run_folder.SCORES_FILE, run_folder.SCORES, ordered)

    def _answers(self, name: str, router: Router) -> dict[Chunk, Answer]:
        """Return every chunk's answer from the journal, after asking for the missing ones.

        A chunk whose stored answer is damaged is asked again, once.
        """
        self.ask({name: router})
        self._wait(name)
        found: dict[Chunk, Answer] = {}
        damaged: list[Chunk] = []
        for chunk in self.chunks:
            key = self._key(router, chunk)
            try:
                found[chunk] = self._journal.read(key)
                self._count(key, chunk)
            except DamagedAnswer as error:
                _LOG.warning("%s; it is asked again", error)
                damaged.append(chunk)
                self._found.discard(key)
                self._known.discard(key)
        if damaged:
            self._add([_RoutedChunk(self._key(router, c), name, router, c) for c in damaged])
            self._wait(name)
            found |= {c: self._journal.read(self._key(router, c)) for c in damaged}
        return found

    def _wait(self, name: str) -> None:
        """Wait for a router's answers; raise PhatgooseError if an actor could not answer."""
        while name in self.open_routers:
            self.step(TICK_SECONDS)
        if name in self.failures:
            raise PhatgooseError(self.failures[name])

    def ask(self, routers: Mapping[str, Router]) -> None:
        """Ask the actors for every chunk under these routers, router by router.

        Requests do not depend on the router, so no actor is idle while lm-eval sums up one router
        and prepares the next. `step` collects the answers, and lm-eval reads them in the journal.
        """
        for name, router in routers.items():
            self._add([_RoutedChunk(self._key(router, c), name, router, c) for c in self.chunks])

    @property
    def is_waiting(self) -> bool:
        """Whether some answers are pending."""
        return bool(self._waiting)

    @property
    def open_routers(self) -> set[str]:
        """The routers with pending answers."""
        return {call.name for call in self._waiting.values()}

    def step(self, timeout: float) -> None:
        """Collect the answers that arrive within `timeout` seconds."""
        for key, result in self._workers.step(timeout):
            self.take(key, result)

    def awaits(self, key: int) -> bool:
        """Return whether the actors' call with this key belongs to this evaluation."""
        return key in self._waiting

    def take(self, key: int, result: Any) -> None:
        """Store an actor's answer in the journal, or record that its router failed."""
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

    def _add(self, calls: Sequence[_RoutedChunk]) -> None:
        """Ask the actors for answers that are not in the journal and not pending."""
        for call in calls:
            if call.key in self._found:
                self._count(call.key, call.chunk)
        calls = [c for c in calls if c.key not in self._known]
        self._known.update(call.key for call in calls)
        arguments = [
            (
                c.router,
                c.chunk,
                self._requests.descriptions[c.chunk.task],
                self._members_of(c.router),
                digest(self._code(c.router)),
            )
            for c in calls
        ]
        keys = self._workers.add("answer", arguments)
        self._waiting |= zip(keys, calls, strict=True)

    def _members_of(self, router: Router) -> Members:
        """Return the experts that an actor must attach for a router: all, or the one it names.

        `NoExpert` ignores the pool, so attach any single expert.
        """
        if isinstance(router, NoExpert):
            return Members(dict([next(iter(self._members.experts.items()))]))
        if isinstance(router, Single):
            known = {**self._members.experts, **self._others}
            return Members({router.expert: known[known_expert(router.expert, list(known))]})
        if needs_profiles([router]):
            return self._members
        return Members(self._members.experts)

    def _key(self, router: Router, chunk: Chunk) -> str:
        """Return the key of an answer; other experts do not affect that of a single expert."""
        members = self._members_of(router)
        pool = "" if isinstance(router, NoExpert) else pool_id(members.experts)
        kind = f"{type(router).__module__}.{type(router).__qualname__}"
        own = [kind, _options(router), digest(self._code(router)), members.profiles]
        if "descriptions" in all_needs(router):
            own.append(self._requests.descriptions[chunk.task])
        return chunk.key([asdict(self._conditions), pool, *own])

    def _code(self, router: Router) -> Code:
        """Return the hashes of the router's own source code."""
        named = repr(router)
        if named not in self._codes:
            self._codes[named] = router_code(router)
        return self._codes[named]

    def _determining(self, router: Router) -> dict[str, Any]:
        """Return what determines the answers under a router, for people to compare."""
        conditions = {k: v for k, v in asdict(self._conditions).items() if k != "code"}
        return {
            **conditions,
            "options": _options(router),
            "code": {**scoring_code(), **self._code(router)},
        }

    def _count(self, key: str, chunk: Chunk) -> None:
        """Count an answer, once per chunk and router."""
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
        """Replace a router's rows of this suite, and keep its rows of other suites."""
        kept = [r for r in _read(self._folder, name, schema) if r["suite"] != self._suite]
        ordered = sorted(kept + rows, key=lambda row: row["suite"])
        run_folder.write_table(self._folder, name, schema, ordered)


def _what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two records of `_determining`; empty if nothing does."""
    names = [name for name in now if name != "code" and before.get(name) != now[name]]
    return listed(names + changes(before["code"], now["code"]))


def _options(router: Router) -> dict[str, Any]:
    """Return a router's options by name."""
    return asdict(router)  # type: ignore[call-overload]  # all routers are dataclasses


def _read(folder: Folder, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    if not folder.exists(name):
        return []
    rows = run_folder.read_table(folder, name, schema).to_pylist()
    return [{**row, "metrics": dict(row["metrics"])} if "metrics" in row else row for row in rows]
