"""Check that padding is left out of products, and that numbers at tokens stay the same."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.base import Base
from phatgoose.question import Question
from phatgoose.training.engine import TargetLoss
from phatgoose.training.gated_lora import GatedLora, attach_lora, detach_lora
from phatgoose.training.token_rows import TokenRows

TEXTS = [("the goose", " yes"), ("Question: is the lake deep and grey?\nAnswer:", " no no"),
         ("a bird flies", " over the lake")]  # fmt: skip


def questions(base: Base, texts: list[tuple[str, str]] = TEXTS) -> list[Question]:
    return [Question.encode(base, context, [target]) for context, target in texts]


@contextmanager
def attached(base: Base, *, gates: bool = False) -> Iterator[dict[str, GatedLora]]:
    layers = attach_lora(base.model, base.linears, rank=3, scale=0.5, init_std=0.3, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.lora_B_OR.data = torch.randn(layer.lora_B_OR.shape, generator=generator) / 3
        if gates:
            layer.add_gate()
            assert layer.gate_D is not None
            layer.gate_D.data = torch.randn(layer.gate_D.shape, generator=generator) / 3
    try:
        yield layers
    finally:
        detach_lora(base.model, layers)


def gradients(module: TargetLoss, asked: list[Question]) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    loss = module(asked)
    loss.backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("gates", [False, True], ids=["lora", "gates"])
def test_loss_and_gradients_are_those_of_padded_rows(base: Base, gates: bool) -> None:
    with attached(base, gates=gates) as layers:
        module, asked = TargetLoss(base, "float32"), questions(base)
        loss, found = gradients(module, asked)
        for layer in layers.values():
            layer.rows = None
        expected_loss, expected = gradients(module, asked)
    torch.testing.assert_close(loss, expected_loss)
    assert set(found) == set(expected)
    assert len(found) == (1 if gates else 2) * len(base.linears)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_no_linear_multiplies_padding(base: Base) -> None:
    """Count the tokens of each frozen linear."""
    read: dict[str, int] = {}
    with attached(base) as layers:
        for name, layer in layers.items():

            def count(_: object, inputs: tuple[Tensor], name: str = name) -> None:
                read[name] = inputs[0][..., 0].numel()

            layer.base.register_forward_pre_hook(count)
        asked = questions(base)
        TargetLoss(base, "float32")(asked)
        for layer in layers.values():
            layer.base._forward_pre_hooks.clear()
    contexts = sum(len(question.context) for question in asked)
    targets = sum(len(question.choices[0]) for question in asked)
    for name, tokens in read.items():
        if not base.is_encoder_decoder:
            assert tokens == contexts + targets - len(asked)
        elif base.architecture.side_of(name) == "encoder":
            assert tokens == contexts
        else:
            assert tokens == targets
    assert set(read) == set(base.linears)


@pytest.mark.parametrize("shares_context", [True, False])
def test_scores_are_those_of_padded_rows(base: Base, shares_context: bool) -> None:
    """Check several choices: where rows are separate, their contexts are counted only once."""
    base = dataclasses.replace(base, shares_context=shares_context and base.shares_context)
    with attached(base, gates=True) as layers:
        module = TargetLoss(base, "float32")
        asked = [
            dataclasses.replace(q, choices=[q.choices[0], q.choices[0][-1:]])
            for q in questions(base)
        ]
        module(asked)  # what a training step announces must not stay
        found = module(asked[::-1], scores=True)[::-1]
        for layer in layers.values():
            layer.rows = None
        expected = module(asked, scores=True)
    assert [s.is_greedy for s in found] == [s.is_greedy for s in expected]
    assert [s.mean for s in found] == pytest.approx([s.mean for s in expected], abs=1e-5)


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    width=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_tokens_are_gathered_and_scattered(lengths: list[int], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    x = torch.randn(*mask_BL.shape, width, requires_grad=True)
    rows = TokenRows()
    rows.announce("decoder", mask_BL)
    x_TD = rows.gather("decoder", x)
    if int((~mask_BL).sum()) < mask_BL.numel() / 10:  # too little to be worth it
        assert x_TD is x
        return
    assert torch.equal(x_TD, x[mask_BL])
    assert rows.gather("decoder", x) is x_TD  # shared by linears of one input
    y = rows.scatter("decoder", x_TD * 2)
    assert torch.equal(y, torch.where(mask_BL.unsqueeze(-1), 2 * x, 0))
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(found, torch.where(mask_BL.unsqueeze(-1), 2 * grad, 0))


def test_inputs_of_another_shape_stay_whole() -> None:
    rows = TokenRows()
    x = torch.randn(2, 3, 4)
    assert rows.gather("decoder", x) is x  # nothing was announced
    rows.announce("decoder", torch.tensor([[True, True, False], [True, True, True]]))
    assert rows.gather("decoder", x) is not x
    for other in (x.view(6, 4), x[:, :2], x[:1]):
        assert rows.gather("decoder", other) is other
    assert rows.gather("encoder", x) is x


def test_an_input_that_changes_in_place_is_gathered_again() -> None:
    rows = TokenRows()
    rows.announce("decoder", torch.tensor([[True, False], [True, True]]))
    x = torch.randn(2, 2, 4)
    before = rows.gather("decoder", x).clone()
    x += 1
    torch.testing.assert_close(rows.gather("decoder", x), before + 1)


def test_nothing_that_was_gathered_is_kept(llama: Base) -> None:
    with attached(llama):
        module = TargetLoss(llama, "float32")
        module(questions(llama))
        assert module.rows._gathered is None
        with pytest.raises(IndexError):
            module([Question([1, 2], [])])
        assert module.rows._gathered is None
