"""Training jobs that are interrupted and resume from their checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from phatgoose.base import Base
from phatgoose.expert import Expert
from phatgoose.training.checkpoint import State
from phatgoose.training.curve import CurveRow
from phatgoose.training.engine import PlainEngine
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import Example, Hooks, train_expert
from tests.support.tiny import make_card

WORDS = ["goose", "swan", "lake", "bird", "flock", "two", "three", "five", "nine", "yes", "no"]
TRAIN = [
    Example(f"the grey {word} is", " ".join(WORDS[: i % 3 + 1])) for i, word in enumerate(WORDS)
]
EVALUATION = [Example(f"the {word}", "goose") for word in WORDS[:3]]
RECIPE = Recipe(
    rank=2,
    scale=1.0,
    init_std=0.1,
    lora=Stage(steps=6, lr=5e-2, warmup=0.5),
    gates=Stage(steps=4, lr=5e-2),
    batch_size=4,
    micro_batch_size=2,
    evaluation_examples=3,
    validate_every=2,
    validation_examples=1,
    dtype="float32",
)
# Forward passes of one undisturbed job: micro-batches, validations and evaluations.
PASSES = 6 * 2 + 3 + 2 + 4 * 2 + 2 + 2


class Memory:
    """Checkpoints kept as bytes, due at every step."""

    def __init__(self, owner: str = "") -> None:
        self.owner, self.data = owner, b""
        self.saved: list[tuple[str, int]] = []

    def load(self) -> State | None:
        return State.from_bytes(self.data, self.owner) if self.data else None

    def due(self) -> bool:
        return True

    def save(self, state: State) -> None:
        self.saved.append((state.stage, state.step))
        self.data = state.to_bytes(self.owner)


class Killed(BaseException):
    """Raised in place of the end of the process."""


def train(
    base: Base, recipe: Recipe = RECIPE, engine: Any = PlainEngine, **options: Any
) -> tuple[Expert, list[CurveRow]]:
    rows: list[CurveRow] = []
    card = make_card("task", base)
    hooks = Hooks(engine=engine, report=rows.append, **options)
    expert = train_expert(base, card, TRAIN, EVALUATION, recipe, hooks)
    return expert, rows


def kill_at(passes: int) -> Callable[[], None]:
    """Return a heartbeat callback that ends the process after this many forward passes."""
    left = [passes]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return count


def train_interrupted(
    base: Base, at: list[int], recipe: Recipe = RECIPE, engine: Any = PlainEngine
) -> tuple[Expert, list[CurveRow], Memory]:
    """Train with an interruption after this many forward passes, repeatedly, then to the end."""
    memory = Memory()
    for passes in at:
        try:
            train(base, recipe, engine, checkpoints=memory, heartbeat=kill_at(passes))
        except Killed:
            torch.manual_seed(passes)  # another process has other random states
    expert, rows = train(base, recipe, engine, checkpoints=memory)
    return expert, rows, memory


def timeless(rows: list[CurveRow]) -> list[CurveRow]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows]
