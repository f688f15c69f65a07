"""Leave padding out of the products of the trained layers.

Shape suffixes: B rows, L positions, D features, T tokens that are not padding.

    x_BLD ──gather──► x_TD ──linears──► y_TO ──scatter──► y_BLO, zero at the padding

Attention keeps its rows. Whatever a model computes at the padding is never read at a token, so the
numbers at the tokens are those of padded rows up to rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phatgoose.inference.forward_context import ForwardContext

# To gather and scatter tokens takes as long as to multiply this share of padding.
_CHEAP = 0.1


@dataclass(frozen=True)
class _Places:
    """Where the tokens of rows are.

    Attributes:
        tokens_T: the place of each token in the flattened rows.
        sources: for each place its token's number, and 0 for padding.
        padding: the places of padding.
    """

    tokens_T: Tensor
    sources: Tensor
    padding: Tensor

    @classmethod
    def of(cls, mask_BL: Tensor) -> "_Places":
        """Return the places of the tokens of a mask."""
        is_token = mask_BL.flatten()
        sources = (is_token.cumsum(0) - 1).masked_fill(~is_token, 0)
        return cls(is_token.nonzero().squeeze(1), sources, (~is_token).nonzero().squeeze(1))


class TokenRows(ForwardContext):
    """The places of the tokens in the rows of the current pass, by side.

    Linears that read the same input share what was gathered from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, _Places] = {}
        self._gathered: tuple[Tensor, int, Tensor] | None = None

    def announce(self, side: str, mask_BL: Tensor, queries_BL: Tensor | None = None) -> None:
        """Set what the next pass of one side reads."""
        super().announce(side, mask_BL, queries_BL)
        self._places[side] = _Places.of(mask_BL)

    def release(self) -> None:
        """Free what was gathered. The backward pass may still need the places."""
        self._gathered = None

    def gather(self, side: str, x: Tensor) -> Tensor:
        """Return the tokens [T, D] of an input [B, L, D], or the input if there is nothing to do.

        That is if it has little padding, or if it does not have the shape of the announced rows,
        such as the input of an expert in a mixture of experts.
        """
        mask_BL = self.masks.get(side)
        if mask_BL is None or x.shape[:-1] != mask_BL.shape:
            return x
        if len(self._places[side].padding) < _CHEAP * mask_BL.numel():
            return x
        if self._gathered is not None:
            read, version, x_TD = self._gathered
            if read is x and version == x._version:  # and it was not changed in place
                return x_TD
        x_TD = _Gather.apply(x, self._places[side])
        self._gathered = x, x._version, x_TD
        return x_TD

    def scatter(self, side: str, y_TO: Tensor) -> Tensor:
        """Return what linears made of gathered tokens as rows [B, L, O]."""
        # The view is made here, because a model may change it in place.
        y: Tensor = _Scatter.apply(y_TO, self._places[side]).view(*self.masks[side].shape, -1)
        return y


def _rows_of(y_TO: Tensor, places: _Places) -> Tensor:
    # Twice as fast as index_copy_ into zeros.
    return y_TO.index_select(0, places.sources).index_fill_(0, places.padding, 0)


def _tokens_of(x: Tensor, places: _Places) -> Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, places.tokens_T)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: _Places) -> Tensor:
        ctx.places, ctx.shape = places, x.shape
        return _tokens_of(x, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None]:
        return _rows_of(dx_TD, ctx.places).view(ctx.shape), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TO: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return _rows_of(y_TO, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _tokens_of(dy, ctx.places), None
