"""Check that a job interrupted anywhere gives the exact weights of an undisturbed one."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.training.checkpoint import State, owner_of
from phatgoose.training.engine import PlainEngine
from phatgoose.training.recipe import Stage
from phatgoose.training.train import Hooks, train_gates
from tests.support.interrupted import (
    EVALUATION,
    PASSES,
    RECIPE,
    TRAIN,
    Killed,
    Memory,
    kill_at,
    timeless,
    train,
    train_interrupted,
)
from tests.support.tiny import make_experts


@pytest.mark.parametrize("at", [[3], [5], [12], [15], [16], [19], [24], [7, 9, 4]])
def test_an_interrupted_job_gives_identical_weights(base: Base, at: list[int]) -> None:
    expected, rows = train(base)
    expert, resumed, memory = train_interrupted(base, at)
    assert timeless(resumed) == timeless(rows)
    assert expert.content_hash() == expected.content_hash()
    assert all(
        later.seconds >= row.seconds >= 0
        for row, later in itertools.pairwise(resumed)
        if row.stage == later.stage
    )
    assert ("gates", 0) in memory.saved


def test_the_best_state_is_restored(llama: Base) -> None:
    wild = dataclasses.replace(
        RECIPE, lora=Stage(steps=4, lr=0.5, warmup=0.0), gates=None, validate_every=1
    )
    expected, rows = train(llama, wild)
    losses = [row.loss for row in rows if row.split == "validation"]
    best = losses.index(min(losses))
    # Interrupted after the best state and before worse ones.
    assert best < 3
    expert, resumed, _ = train_interrupted(llama, [1 + 3 * (best + 1) + 2], wild)
    assert timeless(resumed) == timeless(rows)
    assert expert.content_hash() == expected.content_hash()


@settings(max_examples=8, deadline=None)
@given(
    at=st.lists(st.integers(1, PASSES), min_size=1, max_size=3),
    validate_every=st.sampled_from([0, 1, 3]),
    batch_size=st.sampled_from([2, 6, 16]),
)
def test_a_job_may_be_interrupted_anywhere(
    llama_session: Base, at: list[int], validate_every: int, batch_size: int
) -> None:
    recipe = dataclasses.replace(
        RECIPE, validate_every=validate_every, batch_size=batch_size, seed=sum(at)
    )
    expected, rows = train(llama_session, recipe)
    expert, resumed, _ = train_interrupted(llama_session, at, recipe)
    assert timeless(resumed) == timeless(rows)
    assert expert.content_hash() == expected.content_hash()


@pytest.fixture(scope="module")
def llama_session(llama_folder: Any) -> Base:
    from phatgoose.base import load_base

    return load_base(str(llama_folder))


def test_gates_of_an_adapter_resume_too(llama: Base) -> None:
    adapter = make_experts(llama, 1)[0]
    memory = Memory()

    def gates(**options: Any) -> Expert:
        return train_gates(llama, adapter, TRAIN, EVALUATION, RECIPE, Hooks(**options))

    expected = gates()
    with pytest.raises(Killed):
        gates(checkpoints=memory, heartbeat=kill_at(8))
    assert memory.saved == [("gates", 1), ("gates", 2)]
    steps: list[int] = []
    resumed = gates(checkpoints=memory, report=lambda row: steps.append(row.step))
    assert resumed.content_hash() == expected.content_hash()
    assert memory.saved[2:] == [("gates", 3), ("gates", 4)]


def test_every_forward_pass_sends_a_heartbeat(llama: Base) -> None:
    heartbeats: list[None] = []
    train(llama, heartbeat=lambda: heartbeats.append(None))
    assert len(heartbeats) == PASSES


def test_no_step_is_repeated(llama: Base) -> None:
    made: list[int] = []

    class Counting(PlainEngine):
        def loss(self, questions: Any) -> Any:
            made.append(len(questions))
            return super().loss(questions)

    train_interrupted(llama, [2 + 1 + 6], engine=Counting)  # in the fourth step
    assert sum(made) <= (6 + 4 + 1) * 4


def state_of(base: Base) -> Memory:
    memory = Memory("job recipe")
    with pytest.raises(Killed):
        train(base, checkpoints=memory, heartbeat=kill_at(9))
    return memory


def test_a_state_survives_storing(llama: Base) -> None:
    memory = state_of(llama)
    state = State.from_bytes(memory.data, "job recipe")
    assert state.step == 3
    assert state.best_loss == min(r.loss for r in state.curve if r.split == "validation")
    again = State.from_bytes(state.to_bytes("x"), "x")
    for field in dataclasses.fields(State):
        value, other = getattr(state, field.name), getattr(again, field.name)
        if field.name in ("weights", "optimizer", "best", "factors", "random"):
            torch.testing.assert_close(other, value, rtol=0, atol=0)
        else:
            assert other == value


def test_damaged_and_unrelated_states_are_refused(llama: Base) -> None:
    data = state_of(llama).data
    for end in (0, 4, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(PhatgooseError, match="it is damaged"):
            State.from_bytes(data[:end], "job recipe")
    for place in range(9, len(data), len(data) // 50):
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(PhatgooseError, match="it is damaged"):
            State.from_bytes(bytes(changed), "job recipe")
    with pytest.raises(PhatgooseError, match="is from another job, recipe or version"):
        State.from_bytes(data, "job other")


def test_a_state_is_shared_only_by_recipes_that_train_alike() -> None:
    own = owner_of("job", RECIPE)
    assert owner_of("job", dataclasses.replace(RECIPE, micro_batch_size=1)) == own
    others = [
        owner_of("other", RECIPE),
        owner_of("job", dataclasses.replace(RECIPE, seed=1)),
        owner_of("job", dataclasses.replace(RECIPE, lora=Stage(steps=6, lr=1e-3))),
    ]
    assert len({own, *others}) == 4
