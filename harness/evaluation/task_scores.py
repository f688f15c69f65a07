"""What lm-eval makes of the answers to a task: rows of scores and of samples."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval import evaluator

from harness.evaluation.answers import Answer
from harness.evaluation.documents import score_rows
from harness.evaluation.lm import RecordedLM, quiet
from harness.evaluation.requests import TaskRequests
from harness.evaluation.scores import Row
from harness.evaluation.shards import Shard

# Draws for the standard errors of metrics that are not means. lm-eval must not fork for them.
_BOOTSTRAPS = 200
os.environ.setdefault("DISABLE_MULTIPROC", "1")


def score_task(
    name: str, requests: TaskRequests, shards: Sequence[Shard], answer: Answer
) -> tuple[list[Row], list[Row]]:
    """Return a task's rows of scores and of samples.

    Args:
        name: the task's name, with that of its suite.
        requests: the task's requests.
        shards: how they were asked.
        answer: the answer to all of them, in this order.
    """
    task = requests.task
    lm = RecordedLM(shards, answer, requests.targets)

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
