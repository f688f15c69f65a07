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

from phatgoose.errors import PhatgooseError
from phatgoose.expert import LoraFactors


class GatedLora(nn.Module):
    """A frozen linear with LoRA factors, and with a gate once `add_gate` was called.

    Args:
        base: the linear to adapt; its parameters must be frozen.
        rank: LoRA rank R.
        scale: what `B A x` is multiplied by.
        init_std: standard deviation of A's start; B starts at zero, so the layer starts as `base`.
        generator: source of A's random start.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, init_std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        start_RD = torch.randn(rank, base.in_features, generator=generator) * init_std
        device = base.weight.device
        self.lora_A_RD = nn.Parameter(start_RD.to(device))
        self.lora_B_OR = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
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

    Returns:
        The new layers by the linear's name, in the order given.

    Raises:
        PhatgooseError: a name is not a linear of the model, or is adapted already.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in linears:
        linear = find_linear(model, name)
        layers[name] = GatedLora(linear, rank, scale, init_std, generator)
    for name, layer in layers.items():
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


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear called `name` in `model`; PhatgooseError if there is none, or it is adapted."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise PhatgooseError(
            f"the base has no module {name}: was this made for another base?"
        ) from None
    if not isinstance(module, nn.Linear):
        raise PhatgooseError(
            f"{name} is a {type(module).__name__}, not a plain linear: is the base adapted already?"
        )
    return module


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` stands in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
