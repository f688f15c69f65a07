import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.errors import PhatgooseError
from phatgoose.training.recipe import Recipe, Stage
from tests.support.recipes import recipe_from_dict


def test_the_defaults_match_the_paper() -> None:
    recipe = Recipe()
    assert recipe.gates is not None
    assert (recipe.rank, recipe.scale, recipe.init_std, recipe.seed) == (16, 1 / 16, 0.01, 42)
    assert (recipe.lora.steps, recipe.gates.steps, recipe.batch_size) == (1000, 100, 1024)
    assert recipe.lora.lr == recipe.gates.lr == 5e-3
    assert recipe.accumulation * recipe.micro_batch_size == recipe.batch_size


def test_the_learning_rate_warms_up_for_six_percent_of_the_steps() -> None:
    stage = Stage(steps=100)
    factors = [stage.lr_factor(step) for step in range(100)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert factors[6:] == [1.0] * 94


@given(steps=st.integers(0, 2000), warmup=st.floats(0, 1))
def test_any_warmup_reaches_the_full_learning_rate(steps: int, warmup: float) -> None:
    factors = [Stage(steps=steps, warmup=warmup).lr_factor(step) for step in range(steps)]
    assert factors == sorted(factors)
    assert all(0 < factor <= 1 for factor in factors)
    assert not factors or factors[-1] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("evaluation_examples", 0),
        ("max_examples", 0),
        ("max_input_tokens", 0),
        ("max_target_tokens", -1),
        ("micro_batch_size", 7),
        ("dtype", "float16"),
        ("sort_window", 0),
    ],
)
def test_invalid_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(PhatgooseError, match=rf"recipe\.{field}"):
        dataclasses.replace(Recipe(), **{field: value})


def test_a_recipe_survives_storing_in_a_card() -> None:
    recipe = Recipe(rank=4, lora=Stage(steps=7, lr=1e-3), dtype="float32")
    assert recipe_from_dict(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_the_identity_of_a_recipe_is_that_of_version_0_1_0() -> None:
    """Compare with a digest that version 0.1.0 made of its default recipe."""
    text = json.dumps(Recipe().identity(), sort_keys=True)
    digest = "a88b6c56f2e9d1fd925dcea4877059292123795197a424db24e1002767ca1b70"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_only_what_changes_an_expert_changes_the_identity() -> None:
    plain = Recipe().identity()
    assert Recipe(gradient_checkpointing=True).identity() == plain
    assert Recipe(sort_window=2).identity() == {**plain, "sort_window": 2}
    assert recipe_from_dict(plain) == Recipe()
