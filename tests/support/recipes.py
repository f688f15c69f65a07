"""Recipes out of what cards store."""

from typing import Any

from phatgoose.training.recipe import Recipe, Stage


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe from the plain values that a card holds."""
    stages = {name: Stage(**values[name]) for name in ("lora", "gates") if values[name]}
    return Recipe(**{**values, **stages})
