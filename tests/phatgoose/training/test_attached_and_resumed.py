"""Check details of training: which experts fit, what is copied, and error messages."""

import dataclasses

import pytest
import torch

from phatgoose.base import Base
from phatgoose.errors import OutOfMemory, PhatgooseError
from phatgoose.expert import Expert
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.training.engine import PlainEngine, adam_state
from phatgoose.training.gated_lora import attach_expert
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import Example, Hooks, train_expert
from tests.support.tiny import make_card, make_experts

EXAMPLES = [Example("Is the lake deep?", " yes"), Example("two and two is", " four")]
RECIPE = Recipe(
    rank=2, lora=Stage(steps=1), gates=None, batch_size=2, micro_batch_size=2, dtype="float32"
)


@pytest.mark.parametrize("part", ["lora_A_RD", "lora_B_OR"])
def test_an_expert_of_other_shapes_is_not_attached(base: Base, part: str) -> None:
    expert = make_experts(base, 1)[0]
    name = base.linears[-1]
    linear = base.model.get_submodule(name)
    factors = expert.linears[name]
    if part == "lora_A_RD":
        changed = dataclasses.replace(factors, lora_A_RD=factors.lora_A_RD[:, :-1], gate_D=None)
    else:
        changed = dataclasses.replace(factors, lora_B_OR=factors.lora_B_OR[:-1])
    other = Expert(expert.card, {**expert.linears, name: changed})
    found = (changed.lora_A_RD.shape[1], changed.lora_B_OR.shape[0])
    expected = (linear.in_features, linear.out_features)
    with pytest.raises(PhatgooseError) as caught:
        attach_expert(base.model, other)
    assert str(caught.value) == f"expert 'e0' maps {found} on {name}, the base {expected}"
    assert all(type(base.model.get_submodule(n)) is type(linear) for n in base.linears)


def test_the_optimizer_state_is_copied() -> None:
    remembered = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.full((3,), 2.0)}
    state = adam_state(torch.zeros(3), 7, remembered)
    assert state["step"].item() == 7.0
    state["exp_avg"] += 1
    state["exp_avg_sq"] += 1
    assert remembered["exp_avg"].tolist() == [1.0] * 3
    assert remembered["exp_avg_sq"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: out of memory\n  for  16 GiB"),
         "CUDA error: out of memory for 16 GiB"),
        (RuntimeError("not enough memory: " + "x" * 400), "not enough memory: " + "x" * 281),
        (RuntimeError("can't allocate memory"), "can't allocate memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (torch.OutOfMemoryError("so much"), "so much"),
        (MemoryError(), "MemoryError"),
    ],
)  # fmt: skip
def test_an_out_of_memory_error_quotes_the_allocator(
    llama: Base, error: Exception, reason: str
) -> None:
    class Full(PlainEngine):
        def step(self) -> None:
            raise error

    card = make_card("task", llama)
    with pytest.raises(OutOfMemory) as caught:
        train_expert(llama, card, EXAMPLES, EXAMPLES, RECIPE, Hooks(engine=Full))
    assert str(caught.value) == (
        f"memory ran out with micro-batches of 2 ({reason}): lower the recipe's "
        "micro_batch_size or max_input_tokens, set gradient_checkpointing, or use more ranks with "
        "ZeRO"
    )


def test_other_errors_are_unchanged(llama: Base) -> None:
    class Broken(PlainEngine):
        def step(self) -> None:
            raise RuntimeError("shapes differ")

    card = make_card("task", llama)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        train_expert(llama, card, EXAMPLES, EXAMPLES, RECIPE, Hooks(engine=Broken))


def test_a_question_is_its_own_query_by_default(base: Base) -> None:
    question = Question.encode(base, "Is the lake deep?", [" yes", " no"])
    assert question.query == Query("Is the lake deep?", (" yes", " no"))
    other = Query("Is the lake deep?")
    assert Question.encode(base, "Is the lake deep?", [" yes"], query=other).query is other
