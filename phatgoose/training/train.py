"""Train one expert: LoRA factors on a task, then a gate per adapted linear, as PHATGOOSE does.

                    base frozen                          base and factors frozen
    examples ──► [stage lora: A, B of each linear] ──► [stage gates: v of each linear] ──► Expert

Loss is the cross-entropy of the target's tokens, end-of-sequence included (arXiv 2402.05859,
sections 4 and 5.1). What runs a step is an engine, see `phatgoose.training.engine`.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from phatgoose.base import Base
from phatgoose.card import Card
from phatgoose.devices import memory_errors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.training.curve import CurveRow
from phatgoose.training.gated_lora import (
    attach_expert,
    attach_lora,
    detach_lora,
    read_factors,
)
from phatgoose.training.gradient_checkpointing import gradient_checkpointing
from phatgoose.training.recipe import Recipe
from phatgoose.training.trainer import Example, Examples, Hooks, TrainingJob

__all__ = ["CurveRow", "Example", "Examples", "train_expert", "train_gates"]

_NO_HOOKS = Hooks()


def train_expert(
    base: Base,
    card: Card,
    train: Examples,
    evaluation: Examples,
    recipe: Recipe,
    hooks: Hooks = _NO_HOOKS,
) -> Expert:
    """Train LoRA factors on a task, then their gates; the base is left as it was.

    Args:
        base: the frozen model, in the dtype of the recipe, with nothing attached.
        card: the expert's card; its metrics are added here.
        train: training examples.
        evaluation: held-out examples of the same task.
        recipe: how to train; without a stage `gates` the expert gets no gates.
        hooks: what runs the steps, and what is called on the way.

    Raises:
        PhatgooseError: a split is empty, or the base has another dtype.
        Diverged: a loss or a weight is not finite, or the loss exploded (see `check_curve`).
        OutOfMemory: memory ran out.
    """
    _check(base, card, train, evaluation, recipe)
    layers = attach_lora(
        base.model,
        base.linears,
        rank=recipe.rank,
        scale=recipe.scale,
        init_std=recipe.init_std,
        seed=recipe.seed,
    )
    try:
        with _memory_errors(recipe), _prepared(base, recipe):
            job = TrainingJob(base, layers, train, evaluation, recipe, hooks)
            if job.resume() == "gates":
                assert recipe.gates is not None
                metrics = job.state.metrics
                metrics |= job.train_gates(card.name, recipe.gates)
            else:
                metrics = job.train_factors()
                if recipe.gates is not None:
                    metrics |= job.train_gates(card.name, recipe.gates, metrics)
        linears = read_factors(layers)
    finally:
        detach_lora(base.model, layers)
    return Expert(card=dataclasses.replace(card, metrics=metrics), linears=linears)


def train_gates(
    base: Base,
    expert: Expert,
    train: Examples,
    evaluation: Examples,
    recipe: Recipe,
    hooks: Hooks = _NO_HOOKS,
) -> Expert:
    """Train gates for an existing expert, such as one imported from PEFT.

    Arguments and errors are those of `train_expert`; of the recipe only the stage `gates` counts,
    and the expert's own rank and scale stay. The factors come out as they went in, in float32.

    Returns:
        The expert with gates, and the gates' metrics on its card.

    Raises:
        PhatgooseError: as `train_expert`; also if the recipe has no stage `gates`, or the expert
            does not fit the base.
    """
    card = expert.card
    _check(base, card, train, evaluation, recipe)
    stage = recipe.gates
    if stage is None:
        raise PhatgooseError(f"expert {card.name}: the recipe has no stage gates to train")
    if card.base_fingerprint != base.fingerprint:
        raise PhatgooseError(
            f"expert {card.name} was made with base {card.base_fingerprint[:12]}, and {base.name} "
            f"is {base.fingerprint[:12]}: load the base it was made with"
        )
    if recipe.validate_every > stage.steps:  # nothing has to be held out of training
        recipe = dataclasses.replace(recipe, validate_every=0)
    layers = attach_expert(base.model, expert)
    try:
        with _memory_errors(recipe), _prepared(base, recipe):
            job = TrainingJob(base, layers, train, evaluation, recipe, hooks)
            job.resume()
            metrics = card.metrics | job.train_gates(card.name, stage)
        linears = read_factors(layers)
    finally:
        detach_lora(base.model, layers)
    return Expert(card=dataclasses.replace(card, metrics=metrics), linears=linears)


def _check(base: Base, card: Card, train: Examples, evaluation: Examples, recipe: Recipe) -> None:
    if not train or not evaluation:
        raise PhatgooseError(
            f"task {card.task}: {len(train)} training and {len(evaluation)} evaluation examples; "
            "at least one of each is needed"
        )
    if base.model.dtype != getattr(torch, recipe.dtype):
        raise PhatgooseError(
            f"the base is {base.model.dtype}, the recipe trains over {recipe.dtype}: load it so"
        )


@contextmanager
def _prepared(base: Base, recipe: Recipe) -> Iterator[None]:
    """Prepare a frozen base for training, and restore it at the end."""
    with gradient_checkpointing(base, recipe.gradient_checkpointing):
        yield


def _memory_errors(recipe: Recipe) -> AbstractContextManager[None]:
    return memory_errors(
        f"with micro-batches of {recipe.micro_batch_size}",
        "lower the recipe's micro_batch_size or max_input_tokens, set gradient_checkpointing, or "
        "use more ranks with ZeRO",
    )
