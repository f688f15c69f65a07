"""Trade time for memory: keep the inputs of each layer, and compute the layer again when needed."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError


@contextmanager
def gradient_checkpointing(base: Base, enabled: bool = True) -> Iterator[None]:
    """Checkpoint the layers of a base, and restore them at the end.

    A base trains in evaluation mode. `gradient_checkpointing_enable` of transformers has no effect
    there, and in training mode some layers would drop out activations. So the layers that it would
    checkpoint are wrapped here.

    Raises:
        PhatgooseError: the model has no layers that can be checkpointed.
    """
    layers: list[Any] = []
    if enabled:
        layers = [m for m in base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise PhatgooseError(
                f"recipe.gradient_checkpointing=true: base {base.name} has no layers that can be "
                "checkpointed. Set it to false, and lower the micro-batch instead."
            )
    try:
        for layer in layers:
            layer.forward = functools.partial(_checkpointed, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing random happens in evaluation mode.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
