from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.training.gated_lora import GatedLora, attach_lora, detach_lora, read_factors
from tests.support.tiny import state

OPTIONS: dict[str, Any] = {"rank": 3, "scale": 0.25, "init_std": 0.01}


def make_layer(dtype: torch.dtype = torch.float32) -> GatedLora:
    linear = nn.Linear(8, 5, dtype=dtype).requires_grad_(False)
    return GatedLora(linear, 0.01 * torch.randn(3, 8), torch.zeros(5, 3), scale=0.25)


def test_a_new_expert_adds_nothing() -> None:
    layer, x = make_layer(), torch.randn(2, 7, 8)
    assert torch.equal(layer(x), layer.base(x))


def test_a_new_gate_passes_half_of_the_expert() -> None:
    layer, x = make_layer(), torch.randn(2, 7, 8)
    layer.lora_B_OR.data.normal_()
    added = layer(x) - layer.base(x)
    torch.testing.assert_close(added, 0.25 * x @ layer.lora_A_RD.T @ layer.lora_B_OR.T)
    layer.add_gate()
    torch.testing.assert_close(layer(x) - layer.base(x), added / 2)
    assert layer.gate_D is not None
    assert not layer.gate_D.any()


def test_each_stage_trains_its_own_parameters() -> None:
    layer = make_layer()
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A_RD", "lora_B_OR"}
    layer.add_gate()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"gate_D"}


def test_expert_weights_are_float32_over_any_base() -> None:
    layer = make_layer(torch.bfloat16)
    layer.add_gate()
    assert layer.gate_D is not None
    assert {p.dtype for p in (layer.lora_A_RD, layer.lora_B_OR, layer.gate_D)} == {torch.float32}
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_factors_are_initialized_as_in_the_paper(base: Base) -> None:
    layers = attach_lora(base.model, base.linears, seed=0, **OPTIONS)
    starts = torch.cat([layer.lora_A_RD.detach().flatten() for layer in layers.values()])
    assert float(starts.std()) == pytest.approx(0.01, rel=0.1)
    assert abs(float(starts.mean())) < 1e-3
    assert not any(layer.lora_B_OR.any() for layer in layers.values())


def test_the_seed_determines_the_initialization(llama: Base) -> None:
    starts = []
    for seed in (0, 0, 1):
        layers = attach_lora(llama.model, llama.linears, seed=seed, **OPTIONS)
        factors = read_factors(layers)
        starts.append(torch.cat([f.lora_A_RD.flatten() for f in factors.values()]))
        detach_lora(llama.model, layers)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_attaching_and_detaching_leave_the_base_unchanged(base: Base) -> None:
    before, modules = state(base), dict(base.model.named_modules())
    base.model.requires_grad_(True)
    layers = attach_lora(base.model, base.linears, seed=0, **OPTIONS)
    assert tuple(layers) == base.linears
    trained = [name for name, p in base.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(base.linears)
    detach_lora(base.model, layers)
    assert dict(base.model.named_modules()) == modules
    after = base.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_factors_are_read_as_copies(llama: Base) -> None:
    layers = attach_lora(llama.model, llama.linears, seed=0, **OPTIONS)
    name = llama.linears[0]
    factors = read_factors(layers)[name]
    assert factors.gate_D is None
    layers[name].lora_A_RD.data.zero_()
    assert factors.lora_A_RD.any()
    assert not factors.lora_A_RD.requires_grad


def test_an_unsupported_module_is_named_and_nothing_is_replaced(llama: Base) -> None:
    modules = dict(llama.model.named_modules())
    for name, message in (("model.nothing", "no module model.nothing"), ("model.norm", "not a pl")):
        with pytest.raises(PhatgooseError, match=message):
            attach_lora(llama.model, [llama.linears[0], name], seed=0, **OPTIONS)
    assert dict(llama.model.named_modules()) == modules
    attach_lora(llama.model, llama.linears, seed=0, **OPTIONS)
    with pytest.raises(PhatgooseError, match=r"GatedLora, not a plain linear.*adapted already"):
        attach_lora(llama.model, llama.linears, seed=0, **OPTIONS)


def plain_output(layer: GatedLora, x: torch.Tensor) -> torch.Tensor:
    """Compute a layer's output from PyTorch's own operators."""
    h = F.linear(x, layer.lora_A_RD) * layer.scale
    if layer.gate_D is not None:
        h = torch.sigmoid(x @ layer.gate_D).unsqueeze(-1) * h
    return layer.base(x) + F.linear(h, layer.lora_B_OR)


@pytest.mark.parametrize("gated", [False, True], ids=["lora", "gates"])
@pytest.mark.parametrize("trained", ["own", "all"])
def test_gradients_are_those_of_plain_operators(gated: bool, trained: str) -> None:
    torch.manual_seed(0)
    layer = make_layer().double()
    layer.lora_A_RD.data.normal_()
    layer.lora_B_OR.data.normal_()
    if gated:
        layer.add_gate()
        assert layer.gate_D is not None
        layer.gate_D.data.normal_()
    if trained == "all":
        layer.requires_grad_(True)
        layer.base.requires_grad_(False)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weights = [p for p in layer.parameters() if p.requires_grad]
    y, expected_y = layer(x), plain_output(layer, x)
    torch.testing.assert_close(y, expected_y)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *weights], grad)
    expected = torch.autograd.grad(expected_y, [x, *weights], grad)
    assert len(found) == (3 if not gated else 2 if trained == "own" else 4)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_keeps_no_float32_copy_of_an_input() -> None:
    layer = make_layer(torch.bfloat16)
    layer.add_gate()
    x = torch.randn(2, 7, 8, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert kept
    assert all(t.dtype == torch.bfloat16 for t in kept if t.numel() >= x.numel())
    y.sum().backward()
    assert layer.gate_D is not None
    assert layer.gate_D.grad is not None
    assert layer.gate_D.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_the_gates_stage_computes_no_gradient_of_frozen_factors() -> None:
    """Count the products of the backward pass: those of x, and one for the gate."""
    layer = make_layer()
    layer.add_gate()
    x = torch.randn(4, 8, requires_grad=True)
    shapes = []
    y = layer(x)
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    for event in profile.function_events:
        if event.name == "aten::mm":
            shapes.append(event.input_shapes[:2])
    rank, inputs, outputs, tokens = 3, 8, 5, 4
    assert [[rank, tokens], [tokens, inputs]] not in shapes  # of A
    assert [[outputs, tokens], [tokens, rank]] not in shapes  # of B
    assert [[1, tokens], [tokens, inputs]] in shapes  # of the gate
