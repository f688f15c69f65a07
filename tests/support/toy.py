"""A tiny BIG-bench, actors without Ray, and requests, shared by the tests of the harness.

The words of the tasks are those that the tokenizers of `tests.support.tiny` know.
"""

import io
import itertools
import json
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.driver.prepare import prepare_run
from harness.evaluation.actor import EvalActor
from harness.evaluation.answer_files import AnswerFiles
from harness.evaluation.conditions import Conditions
from harness.evaluation.inputs import SuiteInputs
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.scoring import ScoringActor
from harness.evaluation.shards import Limits
from harness.evaluation.stage import Setting
from harness.planning import plan
from harness.planning.plan import Plan
from harness.registry.packs import Members
from harness.scheduling.actor import Refused
from harness.scheduling.workers import Failure, Watch
from harness.storage import Folder
from harness.tasks import TaskData, TaskSpec, prepare_all, write_all
from harness.tasks.sources import bigbench
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.pool import Pool
from tests.support.tiny_encoder import make_encoder

_NAMES = ("goose", "swan", "bird", "lake", "flock", "question")
_DEEDS = ("flies", "swims", "is deep", "is dry", "answers", "is grey")


def generation_task(first: str, answer: str) -> dict[str, Any]:
    """Make a task of 36 documents with a constant answer, which an expert can learn.

    `first` begins each document, so that no two tasks share one.
    """
    pairs = itertools.product(_NAMES, _DEEDS)
    examples = [{"input": f"{first} the {name} {deed}", "target": answer} for name, deed in pairs]
    return {"examples": examples}


def choice_task(first: str, *choices: str) -> dict[str, Any]:
    """Make a task of 36 documents with these choices; the right choice varies."""
    examples = []
    for i, (name, deed) in enumerate(itertools.product(_NAMES, _DEEDS)):
        right = i % len(choices)
        scores = {choice: float(place == right) for place, choice in enumerate(choices)}
        examples.append({"input": f"{first} the {name} {deed}?", "target_scores": scores})
    return {"examples": examples}


TASKS = {
    "birds": generation_task("bird", "goose"),
    "lakes": choice_task("lake", "yes", "no"),
    "numbers": generation_task("two", "five"),
    "swans": choice_task("swan", "the swan", "the grey goose", "no"),
    "sums": generation_task("four", "nine"),
}


def write_archive(path: Path, tasks: Mapping[str, Any]) -> Path:
    """Write tasks into an archive with the layout of BIG-bench's source distribution."""
    with tarfile.open(path, "w:gz") as tar:
        for member, definition in tasks.items():
            data = json.dumps(definition).encode()
            info = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{member}/task.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def prepare_toys(specs: Sequence[TaskSpec], folder: Path) -> list[TaskData]:
    """Put tasks whose members are in `TASKS` into the cache, where runs and actors find them."""
    return prepare_all(specs, from_archive(write_archive(folder / "toys.tar.gz", TASKS)))


def from_archive(path: Path) -> Callable[[Sequence[TaskSpec]], None]:
    """Return a function that prepares BIG-bench tasks from this archive."""
    return lambda specs: write_all(bigbench.read_archive(path, specs))


def toy_config(base: Path, run_dir: Path, **changes: Any) -> Any:
    """Return a run of three experts and two held-out tasks, small enough for a test."""
    from harness.config.schema import RunConfig, RunSection
    from harness.scheduling.settings import BaseConfig, ClusterConfig
    from phatgoose.profile import ProfileConfig
    from phatgoose.training.recipe import Recipe, Stage

    encoder = run_dir.parent / "encoder"
    if not encoder.exists():
        make_encoder(encoder)

    def group(name: str, *tasks: str, **defaults: Any) -> dict[str, Any]:
        return {"name": name, "tasks": {task: {"members": [task]} for task in tasks}, **defaults}

    values: dict[str, Any] = {
        "base": BaseConfig(str(base)),
        "pool": group("toys", "birds", "lakes", "numbers"),
        "suites": [group("held", "swans", "sums", split="all", limit=8, max_new_tokens=4)],
        "router": {"base": {}, "phatgoose": {"top_k": 2}, "merged": {}, "random": {}, "oracle": {}},
        "train": Recipe(
            rank=2,
            scale=1.0,
            init_std=0.1,
            lora=Stage(steps=4, lr=1e-2),
            gates=Stage(steps=2, lr=1e-2),
            batch_size=4,
            micro_batch_size=4,
            evaluation_examples=4,
            dtype="float32",
        ),
        "profile": ProfileConfig(str(encoder), embedded_examples=8, activation_examples=4),
        "cluster": ClusterConfig(),
        "run": RunSection(str(run_dir)),
        "registry": str(run_dir / "registry"),
        "chunk_tokens": 60,
        "shard_tokens": 120,
    }
    return RunConfig(**{**values, **changes})


def toy_arguments(base: Path, run_dir: Path) -> list[str]:
    """Return the toy run as a command line, with one actor that trains one expert at a time."""
    return [
        f"base={base}",
        f"run.dir={run_dir}",
        "pool.name=toys",
        "~pool.tasks",
        *(f"+pool.tasks.{task}.members=[{task}]" for task in ("birds", "lakes", "numbers")),
        "suite.name=held",
        "suite.limit=12",
        "suite.max_new_tokens=4",
        "~suite.tasks",
        *(f"+suite.tasks.{task}.members=[{task}]" for task in ("swans", "sums")),
        "router=[base,phatgoose,oracle]",
        "train.rank=2",
        "train.lora.steps=40",
        "train.gates.steps=20",
        "train.batch_size=4",
        "train.micro_batch_size=4",
        "train.evaluation_examples=4",
        "cluster.max_actors=1",
        "chunk_tokens=20",
        "shard_tokens=40",
        f"profile.encoder={run_dir.parent / 'encoder'}",
        "profile.activation_examples=4",
    ]


def local_actor(base: Base, experts: Sequence[Expert]) -> EvalActor:
    """Return an evaluation actor in this process, without its redirection of standard output."""
    actor = object.__new__(EvalActor)
    actor._base, actor._model, actor._attached, actor._done = base, None, None, 0
    by_hash = {expert.content_hash(): expert for expert in experts}
    actor._open = lambda members: Pool.from_experts(  # type: ignore[method-assign]
        [by_hash[content_hash] for content_hash in members.experts.values()]
    )
    return actor


def members_of(experts: Sequence[Expert]) -> Members:
    """Return the description that an evaluation needs of a pool of these experts."""
    return Members({expert.card.name: expert.content_hash() for expert in experts})


def setting(folder: Path, workers: "LocalWorkers", dtype: str = "float32") -> Setting:
    """Return the setting of evaluations in this run folder, whose actors are in this process."""
    conditions = Conditions.here("tiny's fingerprint", dtype, "cpu")
    if workers.worker is not None:
        workers.worker._files = AnswerFiles(Folder(folder))
    scorer = object.__new__(ScoringActor)
    scorer._done, scorer._built, scorer._documents = 0, {}, {}
    scorers: Any = LocalWorkers(scorer)
    evaluators: Any = workers
    return Setting(Folder(folder), "tiny", conditions, evaluators, scorers)


def inputs_of(requests: SuiteRequests, base: Base, tokens: int) -> SuiteInputs:
    """Return a suite's inputs for actors in this process, in chunks and shards of this size."""
    return SuiteInputs(requests, base, Limits(tokens, tokens))


class LocalWorkers:
    """A replacement for `Workers` that calls one object in this process, in a chosen order.

    Attributes:
        calls: the number of calls.
        most: how many are answered in one step.
    """

    def __init__(self, worker: Any, order: Callable[[list[int]], list[int]] = list) -> None:
        self.worker, self.order, self.calls = worker, order, 0
        self.most = sys.maxsize
        self._waiting: dict[int, tuple[str, tuple[Any, ...]]] = {}
        self._added = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def cancel(self, keys: Sequence[int]) -> list[int]:
        return [key for key in keys if self._waiting.pop(key, None)]

    def add(
        self, method: str, calls: Sequence[tuple[Any, ...]], watch: Watch | None = None
    ) -> range:
        keys = range(self._added, self._added + len(calls))
        self._added += len(calls)
        self._waiting |= {key: (method, call) for key, call in zip(keys, calls, strict=True)}
        return keys

    def step(self, timeout: float) -> list[tuple[int, Any]]:
        results: list[tuple[int, Any]] = []
        for key in self.order(sorted(self._waiting))[: self.most]:
            method, call = self._waiting.pop(key)
            self.calls += 1
            try:
                results.append((key, getattr(self.worker, method)(*call)))
            except PhatgooseError as error:
                results.append((key, Failure(str(error), refused=isinstance(error, Refused))))
        return results


def make_plan(config: RunConfig, device: str = "cpu") -> Plan:
    """Prepare and plan a run in this process."""
    return plan.make_plan(config, prepare_run(config), device)
