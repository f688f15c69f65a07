"""The trainable layer: a frozen linear, a LoRA expert on it, and later a gate for that expert.

Shape suffixes: ... any leading dimensions, T tokens, D input features, O output features, R LoRA
rank.

    stage "lora"    y = W x + scale * B A x                    A and B are trained
    stage "gates"   y = W x + sigmoid(v . x) * scale * B A x   only v is trained

(PHATGOOSE, arXiv 2402.05859, section 4.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phatgoose.architecture import Linear, find_linear, linear_sizes, replace_module
from phatgoose.card import LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.ops.frozen_linear import product
from phatgoose.training.token_rows import TokenRows


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
        # Where the tokens of its input are; None to compute with the padding, too.
        self.rows: TokenRows | None = None
        self.side = "decoder"

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
        if self.rows is None or (x_TD := self.rows.gather(self.side, x)) is x:
            return self._adapted(x)
        return self.rows.scatter(self.side, self._adapted(x_TD))

    def _adapted(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x_TD, y_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        added_TO: Tensor = _AddLora.apply(
            x_TD, y_TO, self.lora_A_RD, self.lora_B_OR, self.gate_D, self.scale
        )
        return added_TO.view_as(y)


class _AddLora(torch.autograd.Function):
    """Add an expert to the outputs of a frozen linear.

    It stores what the backward pass needs and no more: the inputs in the dtype of the computation,
    and products of rank R. In the stage "gates" it computes nothing for the frozen factors.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # autograd tracks tensors that are arguments of their own
        ctx: Any,
        x_TD: Tensor,
        y_TO: Tensor,
        lora_A_RD: Tensor,
        lora_B_OR: Tensor,
        gate_D: Tensor | None,
        scale: float,
    ) -> Tensor:
        # Under autocast, products are in its dtype, and so are all operands here.
        device, dtype = x_TD.device.type, lora_A_RD.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        ctx.scale, ctx.dtype = scale, x_TD.dtype
        x_TD, A_RD, B_OR = x_TD.to(dtype), lora_A_RD.to(dtype), lora_B_OR.to(dtype)
        h_TR = product(x_TD, A_RD).mul_(scale)
        if gate_D is None:
            ctx.save_for_backward(x_TD, A_RD, B_OR, h_TR)
        else:
            gate_D = gate_D.to(dtype)
            gate_T1 = torch.sigmoid(product(x_TD, gate_D.unsqueeze(0)))
            ctx.save_for_backward(x_TD, A_RD, B_OR, h_TR, gate_D, gate_T1)
            h_TR = gate_T1 * h_TR
        if y_TO.dtype == dtype:
            return torch.addmm(y_TO, h_TR, B_OR.t())
        return y_TO + product(h_TR, B_OR).to(y_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, A_RD, B_OR, h_TR, *gate = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_gate, _ = ctx.needs_input_grad
        dx_TD = dA_RD = dB_OR = dgate_D = None
        own_TO = dy_TO.to(x_TD.dtype)
        dh_TR = product(own_TO, B_OR.t())
        if gate:
            gate_D, gate_T1 = gate
            ds_T1 = (dh_TR * h_TR).sum(-1, keepdim=True) * (gate_T1 * (1 - gate_T1))
            if needs_gate:
                dgate_D = (ds_T1.t() @ x_TD).squeeze(0).to(gate_D.dtype)
            if needs_B:
                dB_OR = own_TO.t() @ (gate_T1 * h_TR)
            dh_TR = dh_TR * gate_T1
        elif needs_B:
            dB_OR = own_TO.t() @ h_TR
        dh_TR = dh_TR.mul_(ctx.scale)
        if needs_A:
            dA_RD = dh_TR.t() @ x_TD
        if needs_x:
            dx_TD = product(dh_TR, A_RD.t())
            if gate:
                dx_TD = torch.addmm(dx_TD, ds_T1, gate_D.unsqueeze(0))
            dx_TD = dx_TD.to(ctx.dtype)
        return dx_TD, dy_TO, dA_RD, dB_OR, dgate_D, None


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
