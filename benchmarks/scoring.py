"""Measure choices scored per second against lm-eval's HFLM, on five tasks of BIG-bench.

    python -m benchmarks.scoring [--threads 2] [--rounds 3] [--characters 1500]

Both sides get the same requests of lm-eval in one process, and both tokenize. Ours answers as an
evaluation actor does, with the routing recorded. HFLM runs the base alone, at the batch size that
was the fastest on the first documents of three tasks. Its `auto` searches for the largest batch
that fits, and ends at 64 on a machine with enough memory: it is measured as 64, without the search.
Each round runs all sides of a task, one after the other. The pool has 166 random experts with
random gates, so the routing is about uniform.
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.figures import Figure, compare, print_table
from benchmarks.pools import BASE, plain_base, random_pool
from harness.evaluation.answering import answer_shard
from harness.evaluation.answers import joined
from harness.evaluation.encoding import cut_encoded, encode, encoded_shard
from harness.evaluation.lm import RecordedLM, quiet, requests_of
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.shards import Limits
from harness.tasks import prepare_all, task_specs
from phatgoose.base import Base, load_base
from phatgoose.inference.model import RoutedModel

# Two to ten choices of one to eight tokens, after prompts of about 38, 77, 182, 228, 149 tokens.
TASKS = (
    "sports_understanding",
    "disambiguation_qa",
    "temporal_sequences",
    "salient_translation_error_detection",
    "geometric_shapes",
)
BATCH_SIZES = {"1": 1, "8": 8, "16": 16, "auto": 64}
EXPERTS, RANK = 166, 16
LIMITS = Limits(chunk_tokens=1024, shard_tokens=65536)  # a run's on a CPU


def measure(threads: int = 2, rounds: int = 3, characters: int = 1500) -> list[Figure]:
    """Return the figures of the base alone and of 166 experts, and of each task for the base.

    Args:
        threads: of each side.
        rounds: the median is over so many.
        characters: how much text of each task to score.
    """
    torch.set_num_threads(threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    requests = {name: _first(found, characters) for name, found in _requests().items()}
    base, theirs = load_base(BASE), plain_base()
    model = RoutedModel(base, random_pool(base, EXPERTS))
    size = _best_batch_size(theirs, [_first(found, 1) for found in list(requests.values())[:3]])
    hflm = _hflm(theirs, BATCH_SIZES[size])
    seconds: dict[tuple[str, str], list[float]] = {}
    furthest = 0.0

    def timed(side: str, task: str, ask: Callable[[], list[tuple[float, bool]]]) -> list[float]:
        started = time.perf_counter()
        found = ask()
        seconds.setdefault((side, task), []).append(time.perf_counter() - started)
        return [loglikelihood for loglikelihood, _ in found]

    for _ in range(rounds):
        for task, asked in requests.items():
            _quiet(hflm, _first(asked, 1))  # as below
            expected = timed("HFLM", task, partial(_quiet, hflm, asked))
            for router in ("base", "phatgoose"):
                model.set_router(router)
                _ours(base, model, _first(asked, 1))  # some work is done on the first pass
                answers = timed(router, task, partial(_ours, base, model, asked))
                if router == "base":
                    for a, b in zip(expected, answers, strict=True):
                        furthest = max(furthest, abs(a - b) / max(1.0, abs(a)))
    if furthest > 1e-4:
        raise SystemExit(f"log-likelihoods differ from HFLM's by {furthest:.1e} of their value")
    note = f"HFLM with batch size {size}, {threads} threads"
    same = f"log-likelihoods within {furthest:.0e} of their value"
    counts = {task: len(asked) for task, asked in requests.items()}

    def figure(
        name: str, side: str, tasks: Sequence[str], target: float | None = None, note: str = ""
    ) -> Figure:
        choices = sum(counts[task] for task in tasks)

        def rates(side: str) -> list[float]:
            taken = zip(*(seconds[side, task] for task in tasks), strict=True)
            return [choices / sum(of_tasks) for of_tasks in taken]

        note = note or f"{choices} choices"
        rounds = zip(rates(side), rates("HFLM"), strict=True)
        return compare(name, rounds, better="higher", target=target, note=note)

    return [
        figure("choices/s, base / HFLM", "base", TASKS, 5.0, f"{note}, {same}"),
        figure(f"choices/s, phatgoose {EXPERTS} / HFLM", "phatgoose", TASKS, 2.5, note),
        *(figure(f"  {s}, {t}", s, [t]) for s in ("base", "phatgoose") for t in TASKS),
    ]


def _requests() -> dict[str, list[Instance]]:
    """Return lm-eval's requests of each task, in the prompts of the paper."""
    group = {"name": "bbh", "lists": ["bbh"], "style": "paper", "split": "all", "limit": 50}
    tasks = prepare_all(task_specs({**group, "only": list(TASKS)}))
    suite = SuiteRequests("bbh", tasks)
    return {task.data.name: task.instances for task in suite.tasks.values()}


def _first(instances: Sequence[Instance], characters: int) -> list[Instance]:
    """Return the requests of the first documents that have so many characters together."""
    kept: list[Instance] = []
    document = None
    for instance in instances:
        if instance.doc_id != document:
            if characters <= 0:
                break
            document = instance.doc_id
            characters -= len(instance.args[0])
        characters -= len(instance.args[1])
        kept.append(instance)
    return kept


def _best_batch_size(base: Base, samples: Sequence[list[Instance]]) -> str:
    """Return the batch size at which HFLM answers these requests in the least time."""
    taken = {}
    _quiet(_hflm(base, 1), samples[0])
    for name, size in BATCH_SIZES.items():
        hflm = _hflm(base, size)
        started = time.perf_counter()
        for asked in samples:
            _quiet(hflm, asked)
        taken[name] = time.perf_counter() - started
    return min(taken, key=taken.__getitem__)


def _hflm(base: Base, batch_size: int) -> HFLM:
    return HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=batch_size)


def _quiet(hflm: HFLM, asked: list[Instance]) -> list[tuple[float, bool]]:
    with quiet():
        found: list[tuple[float, bool]] = hflm.loglikelihood(asked, disable_tqdm=True)
    return found


def _ours(base: Base, model: RoutedModel, asked: list[Instance]) -> list[tuple[float, bool]]:
    """Tokenize and answer requests as a run does."""
    requests = [one.request for one in requests_of("score", asked)]
    encoded = encode(base, requests, "")
    shards = cut_encoded("task", "score", encoded, LIMITS)
    by_place = dict(enumerate(encoded))
    answers = [answer_shard(base, model, encoded_shard(shard, by_place)) for shard in shards]
    return RecordedLM(shards, joined(answers)).loglikelihood(asked)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--characters", type=int, default=1500, help="text of each task")
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
