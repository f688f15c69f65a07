"""Check that checkpointed layers give the same training, and that the base is as it was."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.training.engine import TargetLoss
from phatgoose.training.gated_lora import attach_lora, detach_lora
from phatgoose.training.gradient_checkpointing import gradient_checkpointing
from tests.support import interrupted
from tests.support.tiny import make_experts


def questions(base: Base) -> list[Question]:
    texts = [("the goose", " yes"), ("Question: is the lake deep and grey?\nAnswer:", " no no")]
    return [Question.encode(base, context, [target]) for context, target in texts]


def step(base: Base, gates: bool) -> tuple[Tensor, list[Tensor], list[tuple[int, ...]]]:
    """Return loss, gradients, and the shapes of the tensors kept for the backward pass."""
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.append(tuple(tensor.shape))
        return tensor

    layers = attach_lora(base.model, base.linears, rank=3, scale=0.5, init_std=0.3, seed=0)
    for layer in layers.values():
        layer.lora_B_OR.data = torch.linspace(-1, 1, layer.lora_B_OR.numel()).view_as(
            layer.lora_B_OR
        )
        if gates:
            layer.add_gate()
    module = TargetLoss(base, "float32")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(questions(base))
    loss.backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    detach_lora(base.model, layers)
    return loss.detach(), found, kept


@pytest.mark.parametrize("gates", [False, True], ids=["lora", "gates"])
def test_loss_and_gradients_are_equal_and_less_is_kept(base: Base, gates: bool) -> None:
    loss, expected, kept = step(base, gates)
    with gradient_checkpointing(base):
        checkpointed_loss, found, checkpointed = step(base, gates)
    assert torch.equal(checkpointed_loss, loss)
    assert len(found) == len(expected) == (1 if gates else 2) * len(base.linears)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(checkpointed) < len(kept) / 2


def test_a_training_gives_identical_weights(base: Base) -> None:
    expected, rows = interrupted.train(base)
    recipe = dataclasses.replace(interrupted.RECIPE, gradient_checkpointing=True)
    expert, checkpointed = interrupted.train(base, recipe=recipe)
    assert expert.content_hash() == expected.content_hash()
    assert interrupted.timeless(checkpointed) == interrupted.timeless(rows)


def test_routed_scores_are_unaffected_afterwards(base: Base) -> None:
    pool = Pool.from_experts(make_experts(base))

    def scores() -> list[float]:
        model = RoutedModel(base, pool, "phatgoose")
        found = [choices[0].mean for choices in model.score(questions(base))]
        model.detach()
        return found

    expected, forwards = scores(), own_attributes(base)
    recipe = dataclasses.replace(interrupted.RECIPE, gradient_checkpointing=True)
    interrupted.train(base, recipe=recipe)
    assert scores() == expected
    assert own_attributes(base) == forwards


def own_attributes(base: Base) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in base.model.named_modules()}


def test_the_base_is_restored_after_an_error(llama: Base) -> None:
    before = own_attributes(llama)
    with pytest.raises(ZeroDivisionError), gradient_checkpointing(llama):
        1 / 0  # noqa: B018
    assert own_attributes(llama) == before


def test_a_model_without_such_layers_is_refused(
    llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    none: Any = type("NoLayer", (), {})
    monkeypatch.setattr(
        "phatgoose.training.gradient_checkpointing.GradientCheckpointingLayer", none
    )
    recipe = dataclasses.replace(interrupted.RECIPE, gradient_checkpointing=True)
    with pytest.raises(PhatgooseError, match=r"^recipe\.gradient_checkpointing=true: base .* no"):
        interrupted.train(llama, recipe=recipe)
