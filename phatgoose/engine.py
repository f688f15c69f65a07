"""What runs optimiser steps: from a micro-batch to its loss, its gradients, and a step.

`PlainEngine` is plain PyTorch; the harness has one of DeepSpeed.

Shape suffixes: N target tokens of a micro-batch, V vocabulary, L positions, B rows.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.recipe import Recipe, Stage
from phatgoose.scoring import Question, logits_at, pad_rows


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
