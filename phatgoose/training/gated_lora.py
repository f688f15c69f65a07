"""The trainable layer: a frozen linear, a LoRA expert on it, and later a gate for that expert.

Shape suffixes: ... any leading dimensions, D input features, O output features, R LoRA rank.

    stage "lora"    y = W x + scale * B A x                    A and B are trained
    stage "gates"   y = W x + sigmoid(v . x) * scale * B A x   only v is trained

(PHATGOOSE, arXiv 2402.05859, section 4.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phatgoose.architecture import Linear, find_linear, linear_sizes, replace_module
from phatgoose.card import LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert


class GatedLora(nn.Module):
    """A frozen linear with LoRA factors, and with a gate once `add_gate` was called.

    Args:
        base: the linear to adapt; its parameters must be frozen.
        lora_A_RD, lora_B_OR: where the factors start; they are copied, in float32.
        scale: what `B A x` is multiplied by.
    """

    def __init__(self, base: Linear, lora_A_RD: Tensor, lora_B_OR: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        device = base.weight.device
        self.lora_A_RD = nn.Parameter(lora_A_RD.to(device, torch.float32, copy=True))
        self.lora_B_OR = nn.Parameter(lora_B_OR.to(device, torch.float32, copy=True))
        self.gate_D: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen linear's weight: T5's feed-forward reads the dtype of its last linear."""
        return self.base.weight

    def add_gate(self) -> None:
        """Freeze the factors and add a gate of zeros, so that half of the expert passes."""
        self.lora_A_RD.requires_grad_(False)
        self.lora_B_OR.requires_grad_(False)
        self.gate_D = nn.Parameter(torch.zeros_like(self.lora_A_RD[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., D] to [..., O]."""
        y = self.base(x)
        x = x.to(self.lora_A_RD.dtype)
        h = F.linear(x, self.lora_A_RD) * self.scale
        if self.gate_D is not None:
            h = torch.sigmoid(F.linear(x, self.gate_D.unsqueeze(0))) * h
        return y + F.linear(h, self.lora_B_OR).to(y.dtype)


def attach_lora(
    model: nn.Module,
    linears: Sequence[str],
    *,
    rank: int,
    scale: float,
    init_std: float,
    seed: int,
) -> dict[str, GatedLora]:
    """Freeze `model` and put a GatedLora in place of each named linear.

    A starts normal with standard deviation `init_std`, B at zero, so that each layer starts as the
    linear it replaces.

    Returns:
        The new layers by the linear's name, in the order given.

    Raises:
        PhatgooseError: a name is not a linear of the model, or is adapted already.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in linears:
        linear = find_linear(model, name)
        inputs, outputs = linear_sizes(linear)
        start_RD = torch.randn(rank, inputs, generator=generator) * init_std
        start_OR = torch.zeros(outputs, rank)
        layers[name] = GatedLora(linear, start_RD, start_OR, scale)
    return _put_in(model, layers)


def attach_expert(model: nn.Module, expert: Expert) -> dict[str, GatedLora]:
    """Freeze `model` and put a GatedLora with an expert's factors in place of its linears.

    Returns:
        The new layers by the linear's name, without gates.

    Raises:
        PhatgooseError: the expert does not fit the model, or the model is adapted already.
    """
    layers = {}
    for name, factors in expert.linears.items():
        linear = find_linear(model, name)
        expected = linear_sizes(linear)
        found = (factors.lora_A_RD.shape[1], factors.lora_B_OR.shape[0])
        if expected != found:
            raise PhatgooseError(
                f"expert {expert.card.name!r} maps {found} on {name}, the base {expected}"
            )
        layers[name] = GatedLora(linear, factors.lora_A_RD, factors.lora_B_OR, expert.card.scale)
    return _put_in(model, layers)


def _put_in(model: nn.Module, layers: dict[str, GatedLora]) -> dict[str, GatedLora]:
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.requires_grad_(True)
        layer.base.requires_grad_(False)
        replace_module(model, name, layer)
    return layers


def detach_lora(model: nn.Module, layers: dict[str, GatedLora]) -> None:
    """Put the frozen linears back, so that `model` is the base again."""
    for name, layer in layers.items():
        replace_module(model, name, layer.base)


def read_factors(layers: dict[str, GatedLora]) -> dict[str, LoraFactors]:
    """Copy what was trained out of the layers, to the CPU."""

    def copy(parameter: Tensor) -> Tensor:
        return parameter.detach().cpu().clone()

    return {
        name: LoraFactors(
            lora_A_RD=copy(layer.lora_A_RD),
            lora_B_OR=copy(layer.lora_B_OR),
            gate_D=None if layer.gate_D is None else copy(layer.gate_D),
        )
        for name, layer in layers.items()
    }
