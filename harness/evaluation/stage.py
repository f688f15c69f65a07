"""The evaluation of routers on one suite, as the driver sees it: calls, receipts and scores.

    shards ──► evaluation actors ──► answers/ ──► scoring actors ──► samples/, routing/
                     │ receipts                        │ rows
                     └──────────► Evaluation ◄─────────┘ scores.parquet

The driver neither sends requests nor receives answers: it gives actors what stands for their
inputs, and hears what became of them.
"""

import contextlib
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from harness import run_folder
from harness.evaluation.actor import Asked, Receipt
from harness.evaluation.answer_files import AnswerFiles, task_key
from harness.evaluation.conditions import Conditions, library_versions, scoring_code
from harness.evaluation.identity import Identity, options_of, what_changed
from harness.evaluation.inputs import SuiteInputs
from harness.evaluation.router_state import RouterState, reasons_of
from harness.evaluation.scores import Row, is_marked, read_scores, write_scores
from harness.evaluation.scoring import Scored, ScoredTask, ToScore, bare_name, result_key
from harness.evaluation.shards import Shard
from harness.metrics import primary_mean
from harness.registry.packs import Members, pool_id
from harness.scheduling.actor import Refused
from harness.scheduling.workers import ATTEMPTS, Failure, Killed, Watch, Workers
from harness.source_code import METRICS, code_of, digest
from harness.storage import Folder
from phatgoose.errors import OutOfMemory, PhatgooseError, listed
from phatgoose.routers import Router
from phatgoose.routers.interface import side_information

_LOG = logging.getLogger(__name__)
# So many shards that fail, and none that is answered, are no accident.
_HOPELESS = 3
_ASK_SECONDS = 1.0
_SHOWN = 5


@dataclass(frozen=True)
class Setting:
    """The settings that all evaluations of a run share.

    Attributes:
        folder: the run folder. The run has its name.
        base: the base's name.
        conditions: the conditions of the answers.
        evaluators: the evaluation actors.
        scorers: the scoring actors.
    """

    folder: Folder
    base: str
    conditions: Conditions
    evaluators: Workers
    scorers: Workers


class Evaluation:
    """The evaluation of routers over one pool on one suite.

    Args:
        setting: the settings that all evaluations of the run share.
        inputs: the suite's requests, as actors get them.
        members: the pool's experts, in its order, and their profiles if a router uses them.
        others: content hashes of experts outside the pool, by name.

    Attributes:
        routers: the state of each router, by its name.
    """

    def __init__(
        self,
        setting: Setting,
        inputs: SuiteInputs,
        members: Members,
        others: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._inputs, self.suite = setting.folder, inputs, inputs.suite
        self._evaluators, self._scorers = setting.evaluators, setting.scorers
        self._members = members
        self._identity = Identity(setting.conditions, members, others or {})
        self._common = {
            "run": PurePosixPath(str(setting.folder)).name,
            "base": setting.base,
            "manifest": pool_id(members.experts),
            "dtype": setting.conditions.dtype,
            "device": setting.conditions.device,
            # lm-eval and this project's code compute metrics from answers.
            "versions": library_versions("lm_eval"),
            "code": digest({**scoring_code(), **code_of(METRICS)}),
        }
        self._files = AnswerFiles(setting.folder)
        self._found = self._files.shards()  # answered by an earlier call
        self._scored: dict[str, list[Row]] = {}  # by an earlier call, by router
        for row in read_scores(setting.folder):
            if row["suite"] == self.suite:
                self._scored.setdefault(row["router"], []).append(row)
        self._watch = _Retries(self)
        self._calls: dict[int, str] = {}  # the router of each open call
        self._scoring: dict[int, str] = {}
        self.routers: dict[str, RouterState] = {}

    @property
    def shards(self) -> list[Shard]:
        """The shards of all tasks."""
        return [shard for shards in self._inputs.shards.values() for shard in shards]

    @property
    def total(self) -> int:
        """The number of requests of one router."""
        return sum(shard.requests for shard in self.shards)

    @property
    def has_more(self) -> bool:
        """Whether there are shards that no actor was asked for."""
        return any(state.to_ask for state in self.routers.values())

    @property
    def is_done(self) -> bool:
        """Whether every router is scored or has failed."""
        return all(state.state in ("done", "failed") for state in self.routers.values())

    @property
    def rows(self) -> list[Row]:
        """The rows of scores of all routers that are done."""
        return [row for state in self.routers.values() for row in state.rows]

    @property
    def problems(self) -> list[str]:
        """What has no score, and why: a line for each reason."""
        where = f"see logs/ in {self._folder}"
        return [f"{line}; {where}" for line in reasons_of(self.routers)]

    def add(self, routers: Mapping[str, Router]) -> None:
        """Add routers to evaluate, and find what earlier calls have answered or scored."""
        for name, router in routers.items():
            if name not in self.routers:
                self.routers[name] = self._new(name, router)

    def announce(self, routers: Mapping[str, Router]) -> None:
        """Log which routers are asked again, in one line per reason.

        What determines their answers is recorded in answers.json, and compared with the record of
        an earlier call of the run.
        """
        self.add(routers)
        file = run_folder.ANSWERS_FILE
        noted = run_folder.read_json(self._folder, file) if self._folder.exists(file) else {}
        again: dict[str, dict[str, int]] = {}
        now = {}
        for name, router in routers.items():
            key = f"{self.suite}/{name}"
            now[key] = self._identity.record(router)
            if reason := what_changed(noted.get(key), now[key]):
                again.setdefault(reason, {})[name] = len(self.routers[name].to_ask)
        for reason, counts in again.items():
            if shards := sum(counts.values()):
                named = listed(list(counts))
                _LOG.warning("%s changed: %d shards of %s are asked again", reason, shards, named)
        if noted != {**noted, **now}:
            run_folder.write_json(self._folder, file, {**noted, **now})

    def ask(self, ahead: int) -> None:
        """Ask the actors for shards, router by router, while fewer than `ahead` wait for one.

        The first router's take longer, because they are tokenized. So this ends after about a
        second, and the actors begin with what there is.
        """
        ends = time.monotonic() + _ASK_SECONDS
        for name, state in self.routers.items():
            while state.to_ask:
                if self._evaluators.waiting >= ahead:
                    return
                self._ask(name, *state.to_ask.popleft())
                if time.monotonic() > ends:
                    return

    def stop_asking(self) -> None:
        """Ask for nothing more; what actors are answering now may be taken."""
        for state in self.routers.values():
            self._cancel(state)

    def score(self) -> None:
        """Let actors score the routers whose answers are complete."""
        for name, state in self.routers.items():
            if not state.is_answered:
                continue
            requests, shards = self._inputs.requests, self._inputs.shards
            tasks = {
                task: ScoredTask(requests.data[task], requests.note(task), shards[task], keys)
                for task, keys in state.keys.items()
                if task not in state.failed
            }
            if not tasks:
                state.state = "failed"
                continue
            state.state = "scoring"
            experts = list(self._members.experts)
            columns = self._columns(state.router)
            order = ToScore(self._folder, name, self.suite, experts, columns, tasks)
            (key,) = self._scorers.add("score", [(order,)])
            self._scoring[key] = name

    def awaits(self, key: int) -> bool:
        """Return whether the evaluation actors' call with this key belongs to this evaluation."""
        return key in self._calls

    def awaits_score(self, key: int) -> bool:
        """Return whether the scoring actors' call with this key belongs to this evaluation."""
        return key in self._scoring

    def take(self, key: int, result: Any) -> None:
        """Take an evaluation actor's receipt, or the reason why there is none."""
        name = self._calls.pop(key)
        state = self.routers[name]
        shard, _, _ = state.open.pop(key)
        if isinstance(result, Receipt):
            state.answered += 1
            state.requests += shard.requests
            state.seconds += result.seconds
            state.tokens += result.tokens
            return
        assert isinstance(result, Failure)
        if state.state == "failed":
            return
        state.failed.setdefault(shard.task, result.error)
        if result.traceback:
            state.tracebacks.append(result.traceback)
        if result.refused or (not state.answered and len(state.tracebacks) >= _HOPELESS):
            self._give_up(state, result.error)

    def take_score(self, key: int, result: Any) -> None:
        """Take the scores of a router, or the reason why there are none."""
        name = self._scoring.pop(key)
        state = self.routers[name]
        if isinstance(result, Failure):
            state.tracebacks.append(result.traceback)
            self._give_up(state, result.error)
            return
        assert isinstance(result, Scored)
        if result.damaged:
            self._ask_again(name, result.damaged)
            return
        state.rows, state.state = result.rows, "done"
        state.failed |= result.unanswered
        if not result.rows:
            state.state = "failed"
            return
        with contextlib.suppress(PhatgooseError):  # a task without a primary metric
            mean = f"{100 * primary_mean(result.rows):.1f} % (mean of primary metrics)"
            _LOG.info("scored    %s on %s: %s", name, self.suite, mean)

    def write_scores(self, derived: Collection[str] = ()) -> None:
        """Write the rows of the routers that are done, and those of the routers in `derived`.

        Earlier rows stay if they are of this pool, and of another suite, or of another router on
        the same documents.
        """
        requests = self._inputs.requests
        documents = {bare_name(task): requests.note(task)["hash"] for task in requests.tasks}

        def keeps(row: Row) -> bool:
            if row["manifest"] != self._common["manifest"]:
                return False
            is_other = row["router"] not in {*self.routers, *derived}
            same = documents.get(row["task"]) == row["documents"]
            return row["suite"] != self.suite or (is_other and same)

        write_scores(self._folder, self.rows, keeps, derived)

    def table(self) -> Iterator[Row]:
        """Yield the rows of evaluations.parquet."""
        for name, state in self.routers.items():
            yield {
                "router": name,
                "suite": self.suite,
                "state": state.state,
                "shards": len(self.shards),
                "answered": state.answered,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "errors": [f"{task}: {reason}" for task, reason in state.failed.items()],
                "traceback": state.tracebacks[-1] if state.tracebacks else None,
            }

    def describe(self, key: int) -> str:
        """Return the router and the task of a call."""
        name = self._calls[key]
        return f"router {name}, task {self.routers[name].open[key][0].task}"

    def revised(self, key: int, *, halves: bool) -> tuple[Any, ...] | None:
        """Return the arguments of another try of a call; None if there is none.

        With `halves`, chunks are cut into halves, and there is none if they are single requests.
        """
        state = self.routers[self._calls[key]]
        shard, stored_as, halvings = state.open[key]
        if state.state == "failed" or (
            halves and not (max(map(len, shard.chunks)) - 1) >> halvings
        ):
            return None
        state.open[key] = shard, stored_as, halvings + halves
        return state.asked, self._inputs.shard(shard), stored_as, halvings + halves

    def _new(self, name: str, router: Router) -> RouterState:
        """Return the state of a router that was not asked for in this call."""
        keys: dict[str, list[str]] = {}
        for task, shards in self._inputs.shards.items():
            description = self._inputs.requests.descriptions[task]
            identity = self._identity.of(name, router, description)
            keys[task] = [shard.key(identity) for shard in shards]
        state = RouterState(router, keys)
        if rows := self._scored_before(name, state):
            state.rows, state.state = rows, "done"
        complete = set() if state.rows else self._files.tasks(self.suite, name)
        for task, shards in self._inputs.shards.items():
            is_complete = state.rows or task_key(keys[task]) in complete
            if is_complete:  # a call may have died between joining shards and deleting them
                self._files.delete(self._found.intersection(keys[task]))
            for shard, key in zip(shards, keys[task], strict=True):
                if is_complete or key in self._found:
                    state.answered += 1
                    state.requests += shard.requests
                else:
                    state.to_ask.append((shard, key))
        return state

    def _scored_before(self, name: str, state: RouterState) -> list[Row]:
        """Return the router's rows of an earlier call if these answers were scored alike."""
        rows = self._scored.get(name, [])
        note = self._inputs.requests.note
        wanted = {task: result_key(task_key(keys), note(task)) for task, keys in state.keys.items()}
        columns = self._columns(state.router)
        same = {f"{self.suite}/{row['task']}": row["answers"] for row in rows} == wanted and all(
            row[column] == value for row in rows for column, value in columns.items()
        )
        return rows if same and is_marked(self._folder, self.suite, name, wanted) else []

    def _ask(self, name: str, shard: Shard, key: str) -> None:
        state = self.routers[name]
        if state.asked is None:
            router, code = state.router, digest(self._identity.code(state.router))
            state.asked = self._inputs.put(Asked(router, self._identity.members_of(router), code))
        arguments = state.asked, self._inputs.shard(shard), key
        (call,) = self._evaluators.add("answer", [arguments], self._watch)
        state.open[call] = shard, key, 0
        self._calls[call] = name

    def _ask_again(self, name: str, damaged: Mapping[str, str]) -> None:
        """Ask for damaged answers again, once."""
        state = self.routers[name]
        for message in [*damaged.values()][:_SHOWN]:
            _LOG.warning("%s; it is asked again", message)
        if len(damaged) > _SHOWN:
            _LOG.warning("router %s: and %d more", name, len(damaged) - _SHOWN)
        if state.was_damaged:
            self._give_up(state, f"{next(iter(damaged.values()))}, again")
            return
        state.was_damaged, state.state = True, "asking"
        for task, keys in state.keys.items():
            for shard, key in zip(self._inputs.shards[task], keys, strict=True):
                if key in damaged:
                    state.to_ask.append((shard, key))
                    state.answered -= 1
                    state.requests -= shard.requests

    def _give_up(self, state: RouterState, reason: str) -> None:
        """End the evaluation of a router, and cancel what is asked for it and not begun."""
        state.state, state.rows = "failed", []
        state.failed = dict.fromkeys(state.keys, reason)
        self._cancel(state)

    def _cancel(self, state: RouterState) -> None:
        state.to_ask.clear()
        for key in self._evaluators.cancel(list(state.open)):
            del state.open[key], self._calls[key]

    def _columns(self, router: Router) -> Row:
        """Return the columns of scores.parquet that are the same in all rows of a router."""
        options = options_of(router)
        return {
            **self._common,
            "router_code": digest(self._identity.code(router)),
            "top_k": options.get("top_k"),
            "options": json.dumps({"kind": type(router).name(), **options}),
            "zero_shot": router.zero_shot,
            "side_information": side_information(router),
        }


class _Retries(Watch):
    """Repeats calls: with smaller chunks when Ray killed the actor for want of memory.

    Expected errors that are not the router's, such as those of a disk or a bucket, may pass.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._tries: dict[int, int] = {}

    def went_back(self, key: int, error: str, traceback: str) -> None:
        """Say that a shard is asked again."""
        _LOG.warning("%s: %s; it is asked again", self._evaluation.describe(key), error)

    def revise(self, key: int, error: PhatgooseError) -> tuple[Any, ...] | None:
        """Return the arguments of the next try; None to give up."""
        if isinstance(error, Killed):
            return self._evaluation.revised(key, halves=True)
        self._tries[key] = self._tries.get(key, 0) + 1
        if isinstance(error, Refused | OutOfMemory) or self._tries[key] >= ATTEMPTS:
            return None
        return self._evaluation.revised(key, halves=False)
