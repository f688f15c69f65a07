"""Train gates for existing experts, and experts without gates."""

import dataclasses

import pytest
import torch

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.train import CurveRow, Example, Hooks, train_expert, train_gates
from tests.support.recipes import recipe_from_dict
from tests.support.tiny import make_card, make_experts, state

EXAMPLES = [
    Example("Is the lake deep?", " yes"),
    Example("two and three is", " five"),
    Example("the swan", " swims."),
]
EVALUATION = [Example("Is the goose grey?", " yes")]
RECIPE = Recipe(
    rank=4,
    scale=1.0,
    lora=Stage(steps=3, lr=2e-2),
    gates=Stage(steps=4, lr=5e-2),
    batch_size=2,
    micro_batch_size=2,
    dtype="float32",
)


def test_gates_trained_later_equal_those_trained_immediately(base: Base) -> None:
    card = make_card("task", base, scale=1.0)
    at_once = train_expert(base, card, EXAMPLES, EVALUATION, RECIPE)
    first = dataclasses.replace(RECIPE, gates=None)
    without = train_expert(base, card, EXAMPLES, EVALUATION, first)
    assert all(factors.gate_D is None for factors in without.linears.values())
    assert without.card.metrics.keys() == {"nll_base", "nll_lora"}
    later = train_gates(base, without, EXAMPLES, EVALUATION, RECIPE)
    assert later.card.metrics == at_once.card.metrics
    for name, factors in at_once.linears.items():
        other = later.linears[name]
        assert torch.equal(other.lora_A_RD, factors.lora_A_RD)
        assert torch.equal(other.lora_B_OR, factors.lora_B_OR)
        assert factors.gate_D is not None
        assert other.gate_D is not None
        assert torch.equal(other.gate_D, factors.gate_D)


def test_an_expert_of_a_few_linears_gets_gates_only_there(base: Base) -> None:
    before, rows = state(base), list[CurveRow]()
    expert = make_experts(base, 1, rank=3, gates=False)[0]
    some = dict(list(expert.linears.items())[::3])
    expert = dataclasses.replace(expert, linears=some)
    gated = train_gates(base, expert, EXAMPLES, EVALUATION, RECIPE, Hooks(report=rows.append))
    assert gated.linears.keys() == some.keys()
    for name, factors in some.items():
        assert torch.equal(gated.linears[name].lora_A_RD, factors.lora_A_RD)
        assert torch.equal(gated.linears[name].lora_B_OR, factors.lora_B_OR)
        gate_D = gated.linears[name].gate_D
        assert gate_D is not None
        assert gate_D.any()
    assert {row.stage for row in rows} == {"gates"}
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_incompatible_inputs_are_refused(llama: Base, t5: Base) -> None:
    expert = make_experts(llama, 1, gates=False)[0]
    none = dataclasses.replace(RECIPE, gates=None)
    with pytest.raises(PhatgooseError, match="no stage gates"):
        train_gates(llama, expert, EXAMPLES, EVALUATION, none)
    with pytest.raises(PhatgooseError, match="load the base it was made with"):
        train_gates(t5, expert, EXAMPLES, EVALUATION, RECIPE)
    with pytest.raises(PhatgooseError, match="0 training and 1 evaluation"):
        train_gates(llama, expert, [], EVALUATION, RECIPE)


def test_a_recipe_without_gates_survives_storing() -> None:
    recipe = dataclasses.replace(RECIPE, gates=None)
    assert recipe_from_dict(dataclasses.asdict(recipe)) == recipe
    assert recipe.steps == 3
    assert RECIPE.steps == 7
