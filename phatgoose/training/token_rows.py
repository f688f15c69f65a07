"""Leave padding out of the products of the trained layers.

Shape suffixes: B rows, L positions, D features, T tokens that are not padding.

    x_BLD ──gather──► x_TD ──linears──► y_TO ──scatter──► y_BLO, zero at the padding

Attention keeps its rows. Whatever a model computes at the padding is never read at a token, so the
numbers at the tokens are those of padded rows up to rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phatgoose.inference.forward_context import ForwardContext


class TokenRows(ForwardContext):
    """The places of the tokens in the rows of the current pass, by side.

    Linears that read the same input share what was gathered from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, Tensor] = {}
        self._gathered: tuple[Tensor, Tensor] | None = None

    def announce(self, side: str, mask_BL: Tensor, queries_BL: Tensor | None = None) -> None:
        """Set what the next pass of one side reads."""
        super().announce(side, mask_BL, queries_BL)
        self._places[side] = mask_BL.flatten().nonzero().squeeze(1)

    def release(self) -> None:
        """Free what was gathered. The backward pass may still need the places."""
        self._gathered = None

    def gather(self, side: str, x: Tensor) -> Tensor:
        """Return the tokens [T, D] of an input [B, L, D], or the input if there is nothing to do.

        That is if it has no padding, or if it does not have the shape of the announced rows, such
        as the input of an expert in a mixture of experts.
        """
        mask_BL = self.masks.get(side)
        if mask_BL is None or x.shape[:-1] != mask_BL.shape:
            return x
        if len(self._places[side]) == mask_BL.numel():
            return x
        if self._gathered is None or self._gathered[0] is not x:
            self._gathered = x, _Gather.apply(x, self._places[side])
        return self._gathered[1]

    def scatter(self, side: str, y_TO: Tensor) -> Tensor:
        """Return what linears made of gathered tokens as rows [B, L, O]."""
        shape = self.masks[side].shape
        # The view is made here, because a model may change it in place.
        y: Tensor = _Scatter.apply(y_TO, self._places[side], shape.numel()).view(*shape, -1)
        return y


def _rows_of(y_TO: Tensor, places_T: Tensor, places: int) -> Tensor:
    return y_TO.new_zeros(places, y_TO.shape[1]).index_copy_(0, places_T, y_TO)


def _tokens_of(x: Tensor, places_T: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, places_T)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.shape = x.shape[:-1]
        return _tokens_of(x, places_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None]:
        (places_T,) = ctx.saved_tensors
        return _rows_of(dx_TD, places_T, ctx.shape.numel()).view(*ctx.shape, -1), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, places_T: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(places_T)
        return _rows_of(y_TO, places_T, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (places_T,) = ctx.saved_tensors
        return _tokens_of(dy, places_T), None, None
