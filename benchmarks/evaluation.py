"""Measure what the driver and lm-eval's scoring cost beside actors that answer at once.

    python -m benchmarks.evaluation [--passes 33] [--scored 2] [--limit DOCUMENTS]

The suite is the 19 tasks of BIG-bench Hard that are on the package index. Everything is real but
the model: requests, tokenization, shards, a Ray cluster, the scheduler, answers with the routing of
432 linears to 166 experts, and lm-eval's scoring in actors. An answer is random and takes no time
to compute, so what remains is the cost of the harness. A pass is one router over the suite.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from transformers import AutoTokenizer

from benchmarks.pools import BASE
from benchmarks.scheduler import simulated
from harness.evaluation.actor import Asked, Receipt
from harness.evaluation.answer_files import AnswerFiles
from harness.evaluation.answers import Answer
from harness.evaluation.conditions import Conditions
from harness.evaluation.encoding import EncodedShard
from harness.evaluation.inputs import SuiteInputs
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.scoring import ScoringActor
from harness.evaluation.shards import Limits
from harness.evaluation.stage import Evaluation, Setting
from harness.registry.packs import Members
from harness.scheduling.actor import Actor, code_version
from harness.scheduling.workers import Workers
from harness.storage import Folder
from harness.tasks import prepare_all, task_specs
from phatgoose.base import Base, bare_model, fingerprint, locate_base
from phatgoose.inference.scoring import Score
from phatgoose.routers import Router, make_router

LINEARS, EXPERTS = 432, 166
PASSES_OF_A_STUDY = 190  # 24 routers and 166 single experts
LIMITS = Limits(chunk_tokens=1024, shard_tokens=65536)
_AHEAD = 512
_ON_HUB = ("boolean_expressions", "multistep_arithmetic_two", "web_of_lies")
MIB = 2**20


class Answerer(Actor):
    """An actor that answers at once, with random scores and routing."""

    def __init__(self, run_dir: str, code: str) -> None:
        super().__init__(code)
        self._files = AnswerFiles(Folder(run_dir))
        generator = torch.Generator().manual_seed(0)
        weights_LE = torch.rand(LINEARS, EXPERTS, generator=generator, dtype=torch.float64)
        self._routing = {f"layer.{i}.linear": weights_LE[i] for i in range(LINEARS)}

    def answer(self, asked: Asked, shard: EncodedShard, key: str, halvings: int = 0) -> Receipt:
        """Store an answer like that of `EvalActor.answer`."""
        requests = [one.request for chunk in shard.chunks for one in chunk]
        draw = torch.Generator().manual_seed(int(key[:8], 16))
        answer = Answer(
            scores=[
                [Score(float(value), -1.0, 3, False, False) for value in values]
                for values in (
                    -torch.rand(len(request.choices), generator=draw) for request in requests
                )
            ],
            texts=["(A)" if request.max_new_tokens else "" for request in requests],
            tokens=sum(one.tokens for chunk in shard.chunks for one in chunk),
            routing=self._routing,
            routed=dict.fromkeys(self._routing, 1),
        )
        self._files.write(key, shard.task, answer)
        self._done += 1
        return Receipt(answer.tokens, answer.seconds)


class Scene:
    """The suite's inputs, and an evaluation of some passes on a Ray cluster."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder = Folder(folder)
        group = {"name": "bbh", "lists": ["bbh"], "style": "paper", "split": "all", "limit": limit}
        specs = task_specs(group)
        # The other three are on the hub only.
        tasks = prepare_all([spec for spec in specs if spec.name not in _ON_HUB])
        self.requests = SuiteRequests("bbh", tasks)
        self.base = _base()
        self.inputs = SuiteInputs(self.requests, self.base, LIMITS)
        self.inputs.put = ray.put
        started = time.monotonic()
        self.shards = [shard for shards in self.inputs.shards.values() for shard in shards]
        self.planned = time.monotonic() - started
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.chunks = sum(len(shard.chunks) for shard in self.shards)
        arguments = str(self.folder), code_version()
        self.evaluators = Workers(
            lambda: ray.remote(Answerer).options(max_concurrency=2).remote(*arguments), lambda: 2
        )
        scorer = ray.remote(ScoringActor).options(max_concurrency=2, num_cpus=0)
        self.scorers = Workers(lambda: scorer.remote(*arguments), lambda: 1)

    def evaluation(self) -> Evaluation:
        """Return an evaluation over a pool of 166 experts."""
        conditions = Conditions.here(self.base.fingerprint, "float32", "cpu")
        setting = Setting(self.folder, BASE, conditions, self.evaluators, self.scorers)
        members = Members({f"e{place:03d}": f"{place:064x}" for place in range(EXPERTS)})
        return Evaluation(setting, self.inputs, members)

    def answer(self, evaluation: Evaluation) -> None:
        """Let the actors answer everything."""
        while any(state.to_ask or state.open for state in evaluation.routers.values()):
            evaluation.ask(_AHEAD)
            for key, result in self.evaluators.step(1.0):
                evaluation.take(key, result)

    def score(self, evaluation: Evaluation) -> None:
        """Let the actors score the routers."""
        evaluation.score()
        while not evaluation.is_done:
            for key, result in self.scorers.step(1.0):
                evaluation.take_score(key, result)


def _base() -> Base:
    location = locate_base(BASE)
    model, linears = bare_model(BASE, location)
    tokenizer = AutoTokenizer.from_pretrained(location)
    return Base(BASE, fingerprint(location), model, tokenizer, linears)


def _routers(count: int) -> dict[str, Router]:
    return {f"pass{place}": make_router("phatgoose", top_k=1 + place % 8) for place in range(count)}


def measure(passes: int, scored: int, limit: int | None) -> None:
    """Run the passes, and print what they cost."""
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as folder, simulated(1):
        scene = Scene(Path(folder), limit)
        print(
            f"{len(scene.requests.tasks)} tasks, {sum(s.requests for s in scene.shards)} requests, "
            f"{scene.tokens} tokens, {scene.chunks} chunks, {len(scene.shards)} shards\n"
            f"requests built, tokenized and cut: {scene.planned:.1f} s"
        )
        first = scene.evaluation()
        first.add(_routers(1))
        scene.answer(first)  # actors start, inputs are stored
        scene.score(first)
        before = process.memory_info().rss
        evaluation = scene.evaluation()
        evaluation.add(_routers(1 + passes))
        busy, started = _cpu(process), time.monotonic()
        scene.answer(evaluation)
        seconds, busy = time.monotonic() - started, _cpu(process) - busy
        chunks = passes * scene.chunks
        after = process.memory_info().rss
        files = len(scene.folder.names())
        _print("driver, ms per chunk", 1000 * busy / chunks, "at most 1")
        _print("chunks per second", chunks / seconds, "at least 500")
        _print("driver, MiB before", before / MIB, "under 1024")
        _print(f"driver, MiB after {chunks} chunks", after / MIB, "under 1024")
        _print("files of answers before scoring", files / passes, "per pass")
        for name in list(evaluation.routers)[1 + scored :]:
            del evaluation.routers[name]
        busy, started = _cpu(process), time.monotonic()
        scene.score(evaluation)
        seconds, busy = time.monotonic() - started, _cpu(process) - busy
        assert not evaluation.problems, evaluation.problems
        _print("scoring, seconds per pass and actor", seconds / scored, "")
        _print("driver, ms per pass scored", 1000 * busy / scored, "")
        kept = [name for name in scene.folder.names() if not name.startswith("answers/shards/")]
        own = [name for name in kept if "/pass" in name]
        _print(
            f"files of {PASSES_OF_A_STUDY} passes, compacted",
            len(own) / (1 + scored) * PASSES_OF_A_STUDY,
            "at most 5000",
        )
        sizes = sum((Path(folder) / name).stat().st_size for name in own)
        _print("MiB of a scored pass", sizes / MIB / (1 + scored), "")
        scene.evaluators.close()
        scene.scorers.close()


def _cpu(process: psutil.Process) -> float:
    times: Any = process.cpu_times()
    return float(times.user + times.system)


def _print(name: str, value: float, target: str) -> None:
    print(f"{name:40} {value:12.2f}  {target}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", type=int, default=33)
    parser.add_argument("--scored", type=int, default=2, help="how many of them lm-eval scores")
    parser.add_argument("--limit", type=int, help="documents per task")
    args = parser.parse_args(arguments)
    measure(args.passes, args.scored, args.limit)


if __name__ == "__main__":
    main()
