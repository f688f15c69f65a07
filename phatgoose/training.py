"""Train one expert: LoRA factors on a task, then a gate per adapted linear, as PHATGOOSE does.

                    base frozen                          base and factors frozen
    examples ──► [stage lora: A, B of each linear] ──► [stage gates: v of each linear] ──► Expert

Loss is the cross-entropy of the target's tokens, end-of-sequence included (arXiv 2402.05859,
sections 4 and 5.1). What runs a step is an engine: `PlainEngine` here, DeepSpeed's in the harness.

Shape suffixes: N target tokens of a micro-batch, V vocabulary, L positions, B rows.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Card, Expert
from phatgoose.gated_lora import GatedLora, attach_lora, detach_lora, read_factors
from phatgoose.recipe import Recipe, Stage
from phatgoose.scoring import Question, logits_at, pad_rows, score


@dataclass(frozen=True)
class Example:
    """One training example: what is read, and what is to be written."""

    input: str
    target: str


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


class Engine(Protocol):
    """What runs optimiser steps."""

    def loss(self, questions: Sequence[Question]) -> Tensor:
        """The summed cross-entropy of a micro-batch's targets."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, divided by the number of micro-batches per step."""

    def step(self) -> None:
        """Called after every micro-batch; takes an optimiser step after the last one."""

    def close(self) -> None:
        """Free what the engine holds."""


EngineFactory = Callable[["TargetLoss", list[nn.Parameter], Stage, Recipe], Engine]


class TargetLoss(nn.Module):
    """The module an engine trains: a base with LoRA attached, from a micro-batch to its loss."""

    def __init__(self, base: Base, dtype: str) -> None:
        super().__init__()
        self.base = base
        self.model = base.model
        self.autocast = dtype == "bfloat16"

    def forward(self, questions: Sequence[Question]) -> Tensor:
        """Summed cross-entropy of the questions' first choices (scalar, float32)."""
        with torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.autocast):
            logits_NV, targets_N = target_logits(self.base, questions)
        return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def target_logits(base: Base, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Logits [N, V] where each question's first choice is predicted, and its tokens [N]."""
    pad, device = base.tokenizer.pad_token_id, base.device
    choices = [question.choices[0] for question in questions]
    inputs: dict[str, Tensor] = {}
    if base.is_encoder_decoder:
        start = base.model.config.decoder_start_token_id
        ids_BL, mask_BL = pad_rows([question.context for question in questions], pad)
        decoder_BL, decoder_mask_BL = pad_rows([[start, *choice[:-1]] for choice in choices], pad)
        inputs = {"decoder_input_ids": decoder_BL, "decoder_attention_mask": decoder_mask_BL}
        first = [0] * len(choices)
    else:
        rows = [[*q.context, *choice[:-1]] for q, choice in zip(questions, choices, strict=True)]
        ids_BL, mask_BL = pad_rows(rows, pad)
        first = [len(question.context) - 1 for question in questions]
    inputs |= {"input_ids": ids_BL, "attention_mask": mask_BL}
    places = [(b, first[b] + i) for b, choice in enumerate(choices) for i in range(len(choice))]
    rows_N, columns_N = torch.tensor(places, device=device).T
    with logits_at(base, rows_N, columns_N):
        moved = {name: tensor.to(device) for name, tensor in inputs.items()}
        logits_NV = base.model(**moved, use_cache=False).logits[0]
    return logits_NV, torch.tensor([t for choice in choices for t in choice], device=device)


class PlainEngine:
    """An engine of plain PyTorch, for use without DeepSpeed."""

    def __init__(
        self, module: TargetLoss, parameters: list[nn.Parameter], stage: Stage, recipe: Recipe
    ) -> None:
        self._module, self._parameters, self._recipe = module, parameters, recipe
        self._optimizer = make_optimizer(parameters, stage)
        self._scheduler = make_scheduler(self._optimizer, stage)
        self._micro_batches = 0

    def loss(self, questions: Sequence[Question]) -> Tensor:
        """The summed cross-entropy of a micro-batch's targets."""
        return self._module(questions)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        (loss / self._recipe.accumulation).backward()

    def step(self) -> None:
        """Take an optimiser step after the last micro-batch of a batch."""
        self._micro_batches += 1
        if self._micro_batches % self._recipe.accumulation == 0:
            nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
            self._optimizer.step()
            self._scheduler.step()
            self._optimizer.zero_grad()

    def close(self) -> None:
        """Nothing is held."""


def make_optimizer(parameters: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    """AdamW as the paper sets it: eps 1e-8, no weight decay."""
    return torch.optim.AdamW(parameters, lr=stage.lr, eps=1e-8, weight_decay=0.0)


def make_scheduler(
    optimizer: torch.optim.Optimizer, stage: Stage
) -> torch.optim.lr_scheduler.LRScheduler:
    """A constant rate after a linear warm-up."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, stage.lr_factor)


def train_expert(
    base: Base,
    card: Card,
    train: Sequence[Example],
    evaluation: Sequence[Example],
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
        recipe: how to train.
        engine: what runs the steps.
        report: called with every row of the training curve.

    Raises:
        PhatgooseError: a split is empty, the base has another dtype, or the loss is not finite.
    """
    if not train or not evaluation:
        raise PhatgooseError(
            f"task {card.task}: {len(train)} training and {len(evaluation)} evaluation examples; "
            "at least one of each is needed"
        )
    if base.model.dtype != getattr(torch, recipe.dtype):
        raise PhatgooseError(
            f"the base is {base.model.dtype}, the recipe trains over {recipe.dtype}: load it so"
        )
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
        factors = [p for layer in layers.values() for p in (layer.lora_A_RD, layer.lora_B_OR)]
        before, after = job.run("lora", factors, recipe.lora)
        trained = [factor.detach().clone() for factor in factors]
        for layer in layers.values():
            layer.add_gate()
        gates = [layer.gate_D for layer in layers.values() if layer.gate_D is not None]
        gates_before, gates_after = job.run("gates", gates, recipe.gates)
        _check_only_gates_moved(card.name, factors, trained, gates)
        linears = read_factors(layers)
    finally:
        detach_lora(base.model, layers)
    metrics = {
        "nll_base": before.loss,
        "nll_lora": after.loss,
        "nll_gates_start": gates_before.loss,
        "nll_gates": gates_after.loss,
    }
    return Expert(card=dataclasses.replace(card, metrics=metrics), linears=linears)


class _Job:
    """What both stages of one expert share."""

    def __init__(
        self,
        base: Base,
        layers: dict[str, GatedLora],
        train: Sequence[Example],
        evaluation: Sequence[Example],
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

    def encode(self, example: Example) -> Question:
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
