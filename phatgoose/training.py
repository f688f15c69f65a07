"""Train one expert: LoRA factors on a task, then a gate per adapted linear, as PHATGOOSE does.

                    base frozen                          base and factors frozen
    examples ──► [stage lora: A, B of each linear] ──► [stage gates: v of each linear] ──► Expert

Loss is the cross-entropy of the target's tokens, end-of-sequence included (arXiv 2402.05859,
sections 4 and 5.1). What runs a step is an engine, see `phatgoose.engine`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.engine import Engine, EngineFactory, PlainEngine, TargetLoss
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Card, Expert
from phatgoose.gated_lora import (
    GatedLora,
    attach_expert,
    attach_lora,
    detach_lora,
    read_factors,
)
from phatgoose.recipe import Recipe, Stage
from phatgoose.scoring import Question, score


@dataclass(frozen=True)
class Example:
    """One training example: what is read, and what is to be written.

    `choices` are the answers to choose from, if there are any; only routers look at them.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()


# What is trained on: texts, or the same as token ids, cut to the recipe's lengths already.
Examples = Sequence[Example] | Sequence[Question]


@dataclass(frozen=True)
class Progress:
    """One row of a training curve.

    Attributes:
        stage: `lora` or `gates`.
        split: `train` (loss of a step's batch), `validation` (of examples kept out of training) or
            `evaluation` (of the task's evaluation examples).
        step: optimiser steps done before this loss was measured.
        loss: mean token cross-entropy; but for `train`, averaged per example first.
        exact_match: share of examples that greedy decoding gets right; None in training.
        lr: learning rate of the step; None but in training.
        tokens: tokens read so far in this stage.
        seconds: time so far in this stage.
    """

    stage: str
    split: str
    step: int
    loss: float
    exact_match: float | None
    lr: float | None
    tokens: int
    seconds: float


def train_expert(
    base: Base,
    card: Card,
    train: Examples,
    evaluation: Examples,
    recipe: Recipe,
    *,
    engine: EngineFactory = PlainEngine,
    report: Callable[[Progress], None] = lambda _: None,
) -> Expert:
    """Train LoRA factors on a task, then their gates; the base is left as it was.

    Args:
        base: the frozen model, in the dtype of the recipe, with nothing attached.
        card: what the expert will say of itself; its metrics are added here.
        train: training examples.
        evaluation: examples of the same task that are not trained on.
        recipe: how to train; without a stage `gates` the expert has none.
        engine: what runs the steps.
        report: called with every row of the training curve.

    Raises:
        PhatgooseError: a split is empty, the base has another dtype, or the loss is not finite.
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
        job = _Job(base, layers, train, evaluation, recipe, engine, report)
        metrics = job.train_factors()
        if recipe.gates is not None:
            metrics |= job.train_gates(card.name, recipe.gates)
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
    *,
    engine: EngineFactory = PlainEngine,
    report: Callable[[Progress], None] = lambda _: None,
) -> Expert:
    """Train gates for an expert that is there already, such as one imported from PEFT.

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
    if recipe.validate_every > stage.steps:  # nothing need be kept out of training
        recipe = dataclasses.replace(recipe, validate_every=0)
    layers = attach_expert(base.model, expert)
    try:
        job = _Job(base, layers, train, evaluation, recipe, engine, report)
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


class _Job:
    """What both stages of one expert share."""

    def __init__(
        self,
        base: Base,
        layers: dict[str, GatedLora],
        train: Examples,
        evaluation: Examples,
        recipe: Recipe,
        engine: EngineFactory,
        report: Callable[[Progress], None],
    ) -> None:
        self.base, self.layers, self.recipe = base, layers, recipe
        self.train = train[: recipe.max_examples]
        self.evaluation = [self.encode(e) for e in evaluation[: recipe.evaluation_examples]]
        kept_out = min(recipe.validation_examples, len(self.train) // 10)
        self.validation: list[Question] = []
        if recipe.validates and kept_out:
            self.validation = [self.encode(example) for example in self.train[-kept_out:]]
            self.train = self.train[:-kept_out]
        self.make_engine, self.report = engine, report

    def train_factors(self) -> dict[str, float]:
        """The first stage; returns its metrics."""
        before, after = self.run("lora", self.factors, self.recipe.lora)
        return {"nll_base": before.loss, "nll_lora": after.loss}

    def train_gates(self, name: str, stage: Stage) -> dict[str, float]:
        """The second stage, which nothing but the gates comes out of changed."""
        factors = self.factors
        trained = [factor.detach().clone() for factor in factors]
        for layer in self.layers.values():
            layer.add_gate()
        gates = [layer.gate_D for layer in self.layers.values() if layer.gate_D is not None]
        before, after = self.run("gates", gates, stage)
        _check_only_gates_moved(name, factors, trained, gates)
        return {"nll_gates_start": before.loss, "nll_gates": after.loss}

    @property
    def factors(self) -> list[nn.Parameter]:
        """Every A and B."""
        return [p for layer in self.layers.values() for p in (layer.lora_A_RD, layer.lora_B_OR)]

    def encode(self, example: Example | Question) -> Question:
        if isinstance(example, Question):
            return example
        limits = self.recipe.max_input_tokens, self.recipe.max_target_tokens
        return Question.encode(self.base, example.input, [example.target], *limits)

    def run(
        self, name: str, parameters: list[nn.Parameter], stage: Stage
    ) -> tuple[Progress, Progress]:
        """Train one stage, leaving its best state; returns its evaluation before and after."""
        started, tokens = time.monotonic(), 0
        before = self.measure(name, "evaluation", 0, tokens, started)
        best_loss, best_state = math.inf, None
        module = TargetLoss(self.base, self.recipe.dtype)
        engine = self.make_engine(module, parameters, stage, self.recipe)
        try:
            for step, batch in zip(range(stage.steps), self.batches(), strict=False):
                loss = self.take_step(engine, batch)
                if not math.isfinite(loss):
                    raise PhatgooseError(
                        f"the loss became {loss} at step {step} of stage {name}: "
                        f"lower train.{name}.lr"
                    )
                tokens += sum(question.length for question in batch)
                lr = stage.lr * stage.lr_factor(step)
                seconds = time.monotonic() - started
                self.report(Progress(name, "train", step, loss, None, lr, tokens, seconds))
                if self.validation and (step + 1) % self.recipe.validate_every == 0:
                    measured = self.measure(name, "validation", step + 1, tokens, started)
                    if measured.loss < best_loss:
                        best_loss = measured.loss
                        best_state = [parameter.detach().clone() for parameter in parameters]
        finally:
            engine.close()
        if best_state is not None:
            with torch.no_grad():
                for parameter, best in zip(parameters, best_state, strict=True):
                    parameter.copy_(best)
        return before, self.measure(name, "evaluation", stage.steps, tokens, started)

    def take_step(self, engine: Engine, batch: list[Question]) -> float:
        """One optimiser step; returns the mean token cross-entropy of the batch."""
        # Rows of like length waste little padding; every token weighs the same.
        batch = sorted(batch, key=lambda question: question.length)
        targets = sum(len(question.choices[0]) for question in batch)
        total = 0.0
        for start in range(0, len(batch), self.recipe.micro_batch_size):
            summed = engine.loss(batch[start : start + self.recipe.micro_batch_size])
            engine.backward(summed * (self.recipe.accumulation / targets))
            engine.step()
            total += float(summed.detach())
        return total / targets

    def batches(self) -> Iterator[list[Question]]:
        """Batches without end: the examples in a new order each time round."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        batch: list[Question] = []
        while True:
            for index in torch.randperm(len(self.train), generator=generator).tolist():
                batch.append(self.encode(self.train[index]))
                if len(batch) == self.recipe.batch_size:
                    yield batch
                    batch = []

    def measure(self, name: str, split: str, step: int, tokens: int, started: float) -> Progress:
        """Mean loss and exact match on the examples of `evaluation` or `validation`."""
        scores = []
        questions = self.evaluation if split == "evaluation" else self.validation
        ordered = sorted(questions, key=lambda question: question.length)
        rows = 4 * self.recipe.micro_batch_size  # nothing is kept for a backward pass
        for start in range(0, len(ordered), rows):
            batch = ordered[start : start + rows]
            scores += [choices[0] for choices in score(self.base, batch)]
        loss = -sum(s.mean for s in scores) / len(scores)
        exact = sum(s.is_greedy and s.ends_greedy for s in scores) / len(scores)
        seconds = time.monotonic() - started
        progress = Progress(name, split, step, loss, exact, None, tokens, seconds)
        self.report(progress)
        return progress


def _check_only_gates_moved(
    name: str, factors: list[nn.Parameter], trained: list[Tensor], gates: list[nn.Parameter]
) -> None:
    for factor, before in zip(factors, trained, strict=True):
        if not torch.equal(factor, before):
            raise PhatgooseError(f"expert {name}: a LoRA factor moved while gates were trained")
    if not any(gate.any() for gate in gates):
        raise PhatgooseError(f"expert {name}: no gate moved: train.gates needs steps and a rate")
