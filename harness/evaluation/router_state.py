"""How far the evaluation of a router is, and why it or one of its tasks has no score."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.evaluation.scores import Row
from harness.evaluation.shards import Shard
from phatgoose.errors import listed
from phatgoose.routers import Router


@dataclass
class RouterState:
    """How far the evaluation of one router on one suite is.

    Attributes:
        router: the router.
        keys: by task, the key of the answer to each shard.
        state: `asking`, `scoring`, `done` or `failed`.
        to_ask: the shards that no actor has been asked for, with their keys.
        open: the shards that actors were asked for, by the number of the call.
        answered: the number of shards with an answer, and of their requests.
        failed: why tasks have no score, by name.
        tracebacks: the tracebacks of errors.
        seconds, tokens: what actors took in this call of the run.
        rows: its rows of scores.parquet.
    """

    router: Router
    keys: dict[str, list[str]]
    state: str = "asking"
    to_ask: deque[tuple[Shard, str]] = field(default_factory=deque)
    open: dict[int, tuple[Shard, str, int]] = field(default_factory=dict)
    answered: int = 0
    requests: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    tracebacks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    rows: list[Row] = field(default_factory=list)
    asked: Any = None  # what stands for the calls' `Asked`
    was_damaged: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether it can be scored."""
        return self.state == "asking" and not self.to_ask and not self.open


def reasons_of(routers: Mapping[str, RouterState]) -> list[str]:
    """Return why scores are missing: a line for each reason, which names its routers and tasks."""
    reasons: dict[str, list[str]] = {}
    for name, state in routers.items():
        tasks: dict[str, list[str]] = {}
        for task, reason in state.failed.items():
            tasks.setdefault(reason, []).append(task)
        for reason, failed in tasks.items():
            which = name if state.state == "failed" else f"{name} on {listed(failed)}"
            reasons.setdefault(reason, []).append(which)
    return [
        f"router{'s' if len(names) > 1 else ''} {listed(names)}: {reason}"
        for reason, names in reasons.items()
    ]
