"""Train one expert: its two stages, step by step, resumed from its checkpoint."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.errors import Diverged, PhatgooseError
from phatgoose.question import Question
from phatgoose.training.batches import batches, batches_by_length
from phatgoose.training.checkpoint import (
    Checkpoints,
    NoCheckpoints,
    State,
    random_state,
    set_random_state,
)
from phatgoose.training.curve import CurveRow, check_curve
from phatgoose.training.engine import Engine, EngineFactory, PlainEngine, TargetLoss, copies, put
from phatgoose.training.gated_lora import GatedLora
from phatgoose.training.recipe import Recipe, Stage


@dataclass(frozen=True)
class Example:
    """One training example: what is read, and what is to be written.

    `choices` are the answers to choose from, if there are any; only routers look at them.
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()


# What is trained on: texts, or token ids that are already cut to the recipe's lengths.
Examples = Sequence[Example] | Sequence[Question]


@dataclass(frozen=True)
class Hooks:
    """What a training calls: its engine, its observers and its checkpoints.

    Attributes:
        engine: builds what runs the steps.
        report: called with every row of the training curve. When a job resumes from a checkpoint,
            with the earlier rows too.
        checkpoints: where the job's state is saved and found.
        heartbeat: called after every forward pass, as a sign of life.
    """

    engine: EngineFactory = PlainEngine
    report: Callable[[CurveRow], None] = lambda _: None
    checkpoints: Checkpoints = NoCheckpoints()  # noqa: RUF009  # it has no state
    heartbeat: Callable[[], None] = lambda: None


class TrainingJob:
    """The stages of one expert; the arguments are those of `phatgoose.training.train.train_expert`.

    Args:
        layers: what `attach_lora` or `attach_expert` made of the base.
    """

    def __init__(
        self,
        base: Base,
        layers: dict[str, GatedLora],
        train: Examples,
        evaluation: Examples,
        recipe: Recipe,
        hooks: Hooks,
    ) -> None:
        self.base, self.layers, self.recipe = base, layers, recipe
        self.train = train[: recipe.max_examples]
        self.evaluation = [self.encode(e) for e in evaluation[: recipe.evaluation_examples]]
        kept_out = min(recipe.validation_examples, len(self.train) // 10)
        self.validation: list[Question] = []
        if recipe.validates and kept_out:
            self.validation = [self.encode(example) for example in self.train[-kept_out:]]
            self.train = self.train[:-kept_out]
        self.hooks = hooks
        self.state = State(stage="")  # where this job is
        self.started = 0.0  # of the stage, on the monotonic clock

    def resume(self) -> str:
        """Restore the newest checkpoint; return its stage, or an empty string without one."""
        state = self.hooks.checkpoints.load()
        if state is None:
            return ""
        self.state = state
        for row in state.curve:
            self.hooks.report(row)
        if state.factors:
            put(self.factors, state.factors)
        set_random_state(state.random, self.base.device)
        return state.stage

    def train_factors(self) -> dict[str, float]:
        """Run the first stage; return its metrics."""
        before, after = self.run("lora", self.factors, self.recipe.lora)
        return {"nll_base": before.loss, "nll_lora": after.loss}

    def train_gates(
        self, name: str, stage: Stage, metrics: dict[str, float] | None = None
    ) -> dict[str, float]:
        """Run the second stage, which changes nothing but the gates; return its metrics.

        Args:
            name: of the expert.
            stage: how to train.
            metrics: of the stage before; None if there was none in this process.
        """
        factors, trained = self.factors, copies(self.factors)
        if metrics is not None:  # from now on, the first stage is not repeated
            self.state = State("gates", curve=self.state.curve, metrics=metrics)
            self.state.factors = trained
            self.save()
        self.state.factors = trained
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
        """Return an example as token ids, cut to the recipe's lengths."""
        if isinstance(example, Question):
            return example
        limits = self.recipe.max_input_tokens, self.recipe.max_target_tokens
        return Question.encode(self.base, example.input, [example.target], *limits)

    def run(
        self, name: str, parameters: list[nn.Parameter], stage: Stage
    ) -> tuple[CurveRow, CurveRow]:
        """Train one stage, leaving its best state; return its evaluation before and after."""
        if self.state.stage != name:
            self.state = State(name, curve=self.state.curve)
        self.started = time.monotonic() - self.state.seconds
        module = TargetLoss(self.base, self.recipe.dtype)
        engine = self.hooks.engine(module, parameters, stage, self.recipe)
        try:
            before = self.start(engine)
            self.take_steps(engine, stage)
            if self.state.best:
                engine.put_weights(self.state.best)
            after = self.measure(engine, "evaluation")
            trained = engine.weights()
        finally:
            engine.close()
        put(parameters, trained)
        _check_finite(name, parameters)
        return before, after

    def start(self, engine: Engine) -> CurveRow:
        """Bring the engine to the job's state; return the evaluation before the stage."""
        state = self.state
        if state.step:
            engine.resume(state.weights, state.optimizer, state.step)
        for row in state.curve:
            if (row.stage, row.split) == (state.stage, "evaluation"):
                return row
        return self.measure(engine, "evaluation")

    def take_steps(self, engine: Engine, stage: Stage) -> None:
        """Take the remaining steps of a stage."""
        state, recipe = self.state, self.recipe
        order = self.order(state.step)
        for step in range(state.step, stage.steps):
            batch = [self.encode(self.train[index]) for index in next(order)]
            loss, due = self.take_step(engine, batch)
            state.tokens += sum(question.length for question in batch)
            self.note("train", step, loss, lr=stage.lr * stage.lr_factor(step))
            state.step = step + 1
            if self.validation and state.step % recipe.validate_every == 0:
                measured = self.measure(engine, "validation")
                if state.best_loss is None or measured.loss < state.best_loss:
                    state.best_loss, state.best = measured.loss, engine.weights()
            if due:
                state.weights, state.optimizer = engine.weights(), engine.optimizer_state()
                self.save()
                state.weights, state.optimizer = [], []

    def order(self, skip: int) -> Iterator[list[int]]:
        """Return the batches from that number on, as indices of training examples."""
        recipe = self.recipe
        random = functools.partial(batches, len(self.train), recipe.batch_size, recipe.seed)
        if recipe.sort_window == 1:
            return random(skip)

        def length(index: int) -> int:
            return self.encode(self.train[index]).length

        return batches_by_length(random, length, recipe.sort_window, recipe.seed, skip)

    def take_step(self, engine: Engine, batch: list[Question]) -> tuple[float, bool]:
        """Take an optimizer step; return the mean token loss, and whether a checkpoint is due."""
        # Rows of like length waste little padding; every token weighs the same.
        batch = sorted(batch, key=lambda question: question.length)
        targets = sum(len(question.choices[0]) for question in batch)
        total = 0.0
        starts = range(0, len(batch), self.recipe.micro_batch_size)
        for start in starts[engine.rank :: engine.ranks]:
            summed = engine.loss(batch[start : start + self.recipe.micro_batch_size])
            engine.backward(summed * (self.recipe.accumulation / targets))
            engine.step()
            total += float(summed.detach())
            self.hooks.heartbeat()
        total, due = engine.total([total, float(self.hooks.checkpoints.due())])
        return total / targets, due > 0

    def measure(self, engine: Engine, split: str) -> CurveRow:
        """Measure mean loss and exact match on the examples of `evaluation` or `validation`."""
        questions = self.evaluation if split == "evaluation" else self.validation
        ordered = sorted(questions, key=lambda question: question.length)
        rows = 4 * self.recipe.micro_batch_size  # nothing is kept for a backward pass
        parts = [ordered[start : start + rows] for start in range(0, len(ordered), rows)]
        loss, exact = 0.0, 0
        for first in range(0, len(parts), engine.ranks):
            # A rank without a part of its own repeats the last one: all must run the model.
            own = first + engine.rank
            scores = engine.score(parts[min(own, len(parts) - 1)])
            if own < len(parts):
                loss -= sum(s.mean for s in scores)
                exact += sum(s.is_greedy and s.ends_greedy for s in scores)
            self.hooks.heartbeat()
        loss, right = (total / len(ordered) for total in engine.total([loss, float(exact)]))
        return self.note(split, self.state.step, loss, right)

    def note(
        self,
        split: str,
        step: int,
        loss: float,
        exact_match: float | None = None,
        lr: float | None = None,
    ) -> CurveRow:
        """Add a row to the curve; raise Diverged if it shows that training diverged."""
        state = self.state
        state.seconds = time.monotonic() - self.started
        row = CurveRow(state.stage, split, step, loss, exact_match, lr, state.tokens, state.seconds)
        state.curve.append(row)
        check_curve(state.curve, self.base.model.config.vocab_size)
        self.hooks.report(row)
        return row

    def save(self) -> None:
        """Write a checkpoint."""
        self.state.random = random_state(self.base.device)
        self.hooks.checkpoints.save(self.state)


def _check_finite(stage: str, parameters: Sequence[Tensor]) -> None:
    """Check the weights after the last step: an earlier fault shows in the next loss."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise Diverged(
            f"the weights became NaN or infinite in the last step of stage {stage}: lower the "
            f"recipe's {stage}.lr, or set its retry_lr"
        )


def _check_only_gates_moved(
    name: str, factors: list[nn.Parameter], trained: list[Tensor], gates: list[nn.Parameter]
) -> None:
    for factor, before in zip(factors, trained, strict=True):
        if not torch.equal(factor.detach().cpu(), before):  # copies are on the CPU
            raise PhatgooseError(f"expert {name}: a LoRA factor moved while gates were trained")
    if not any(gate.any() for gate in gates):
        raise PhatgooseError(
            f"expert {name}: no gate moved: the recipe's gates need steps and a learning rate"
        )
