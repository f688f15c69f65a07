"""Run optimizer steps: from a micro-batch to its loss, its gradients, and a step.

`PlainEngine` is plain PyTorch; the harness has one of DeepSpeed. Several processes, the ranks, may
train one expert together: each runs the same code, with its share of every batch. What an engine
gives of weights is whole all the same, and the methods marked so are to be called by all ranks.

Shape suffixes: N target tokens of a micro-batch, V vocabulary, L positions, B rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.base import Base
from phatgoose.inference.forward_context import ForwardContext
from phatgoose.inference.scoring import Score, logits_at, score_as_is
from phatgoose.question import Question
from phatgoose.rows import pad_rows
from phatgoose.training.gated_lora import GatedLora
from phatgoose.training.recipe import Recipe, Stage
from phatgoose.training.token_rows import TokenRows


class Engine(Protocol):
    """An interface that runs optimizer steps.

    Attributes:
        rank: which of the ranks this is.
        ranks: how many train together.
    """

    rank: int
    ranks: int

    def loss(self, questions: Sequence[Question]) -> Tensor:
        """Return the summed cross-entropy of a micro-batch's targets."""

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, divided by the number of micro-batches per step."""

    def step(self) -> None:
        """Take an optimizer step after the last micro-batch of a batch; call it after every one."""

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """Score the questions' first choices. Every rank must call it."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Return each value's sum over the ranks. Every rank must call it."""

    def weights(self) -> list[Tensor]:
        """Return copies of the trained weights on the CPU. Every rank must call it."""

    def put_weights(self, weights: Sequence[Tensor]) -> None:
        """Replace the trained weights. Every rank must call it."""

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        """Return copies of the optimizer state of each weight. Every rank must call it."""

    def resume(
        self, weights: Sequence[Tensor], optimizer: Sequence[dict[str, Tensor]], step: int
    ) -> None:
        """Resume after `step` steps with these weights and states. Every rank must call it."""

    def close(self) -> None:
        """Free what the engine holds; what was trained is to be read before."""


EngineFactory = Callable[["TargetLoss", list[nn.Parameter], Stage, Recipe], Engine]


class TargetLoss(nn.Module):
    """The module an engine trains: a base with LoRA attached, from a micro-batch to its loss."""

    def __init__(self, base: Base, dtype: str) -> None:
        super().__init__()
        self.base = base
        self.model = base.model
        self.autocast = dtype == "bfloat16"
        self.rows = TokenRows()
        for name, module in base.model.named_modules():
            if isinstance(module, GatedLora):
                module.rows, module.side = self.rows, base.architecture.side_of(name)

    def forward(self, questions: Sequence[Question], scores: bool = False) -> Any:
        """Return the summed cross-entropy of the questions' first choices (scalar, float32).

        With `scores`, a list of their Scores instead.
        """
        try:
            if scores:
                with torch.no_grad():
                    self.rows.clear()  # its rows have little padding, and their masks are counts
                    found = score_as_is(self.base, questions)
                return [choices[0] for choices in found]
            with torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.autocast):
                logits_NV, targets_N = target_logits(self.base, questions, self.rows)
            return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        finally:
            self.rows.release()


def target_logits(
    base: Base, questions: Sequence[Question], rows: ForwardContext
) -> tuple[Tensor, Tensor]:
    """Return logits [N, V] where each question's first choice is predicted, and its tokens [N].

    `rows` is where the pass announces what it reads.
    """
    pad, device = base.tokenizer.pad_token_id, base.device
    choices = [question.choices[0] for question in questions]
    inputs: dict[str, Tensor] = {}
    if base.is_encoder_decoder:
        start = base.model.config.decoder_start_token_id
        ids_BL, mask_BL = pad_rows([question.context for question in questions], pad)
        decoder_BL, decoder_mask_BL = pad_rows([[start, *choice[:-1]] for choice in choices], pad)
        inputs = {"decoder_input_ids": decoder_BL, "decoder_attention_mask": decoder_mask_BL}
        rows.announce("encoder", mask_BL.to(device).bool())
        rows.announce("decoder", decoder_mask_BL.to(device).bool())
        first = [0] * len(choices)
    else:
        whole = [[*q.context, *choice[:-1]] for q, choice in zip(questions, choices, strict=True)]
        ids_BL, mask_BL = pad_rows(whole, pad)
        rows.announce("decoder", mask_BL.to(device).bool())
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

    rank, ranks = 0, 1

    def __init__(
        self, module: TargetLoss, parameters: list[nn.Parameter], stage: Stage, recipe: Recipe
    ) -> None:
        self._module, self._parameters = module, parameters
        self._stage, self._recipe = stage, recipe
        self._optimizer = make_optimizer(parameters, stage)
        self._scheduler = make_scheduler(self._optimizer, stage)
        self._micro_batches = 0

    def loss(self, questions: Sequence[Question]) -> Tensor:
        """Return the summed cross-entropy of a micro-batch's targets."""
        loss: Tensor = self._module(questions)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        (loss / self._recipe.accumulation).backward()

    def step(self) -> None:
        """Take an optimizer step after the last micro-batch of a batch."""
        self._micro_batches += 1
        if self._micro_batches % self._recipe.accumulation == 0:
            nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
            self._optimizer.step()
            self._scheduler.step()
            self._optimizer.zero_grad()

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """Score the questions' first choices."""
        scores: list[Score] = self._module(questions, scores=True)
        return scores

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the values, as there is one rank."""
        return list(values)

    def weights(self) -> list[Tensor]:
        """Return copies of the trained weights."""
        return copies(self._parameters)

    def put_weights(self, weights: Sequence[Tensor]) -> None:
        """Put other weights in their place."""
        put(self._parameters, weights)

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        """Return copies of AdamW's state of each weight."""
        return [
            {name: self._optimizer.state[p][name].cpu().clone() for name in ADAM_STATE}
            for p in self._parameters
        ]

    def resume(
        self, weights: Sequence[Tensor], optimizer: Sequence[dict[str, Tensor]], step: int
    ) -> None:
        """Go on after so many steps."""
        self.put_weights(weights)
        for parameter, remembered in zip(self._parameters, optimizer, strict=True):
            self._optimizer.state[parameter] = adam_state(parameter, step, remembered)
        set_step(self._optimizer, self._scheduler, self._stage, step)

    def close(self) -> None:
        """Do nothing."""


# AdamW's state of a weight, besides the number of steps.
ADAM_STATE = ("exp_avg", "exp_avg_sq")


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return copies on the CPU."""
    return [parameter.detach().cpu().clone() for parameter in parameters]


def put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def adam_state(parameter: Tensor, step: int, remembered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter after so many steps."""
    moved = {name: t.to(parameter.device, copy=True) for name, t in remembered.items()}
    return {"step": torch.tensor(float(step)), **moved}


def set_step(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stage: Stage,
    step: int,
) -> None:
    """Advance a new schedule by so many steps."""
    scheduler.last_epoch = step
    for group in optimizer.param_groups:
        group["lr"] = stage.lr * stage.lr_factor(step)


def make_optimizer(parameters: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    """Return AdamW with the paper's settings: eps 1e-8, no weight decay."""
    # Hundreds of small weights: on a CPU, one kernel per weight takes a third of the time. On other
    # devices PyTorch's default is fast.
    fused = all(parameter.device.type == "cpu" for parameter in parameters)
    return torch.optim.AdamW(
        parameters, lr=stage.lr, eps=1e-8, weight_decay=0.0, fused=fused or None
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, stage: Stage
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a constant learning rate after a linear warm-up."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, stage.lr_factor)
