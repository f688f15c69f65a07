"""Undo what ZeRO stage 3 does to a model: restore complete weights in plain parameters."""

from typing import Any

import torch
from torch import Tensor, nn


class WholeWeights:
    """The state of a model before ZeRO stage 3 partitions it.

    The weights stay where they are. So the model is loaded to the memory of the host, as a mapped
    file, and only the partitions are on the device.

    Args:
        module: the model, before it is partitioned.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._parameters: list[dict[str, Any]] = [m._parameters for m in self._modules]
        self._attributes = [set(vars(m)) for m in self._modules]
        self._values: dict[nn.Parameter, Tensor] = {p: p.data for p in module.parameters()}
        self._own = {p: set(vars(p)) for p in self._values}

    def restore(self) -> None:
        """Restore the model's parameters, weights and attributes."""
        for module, parameters, own in zip(
            self._modules, self._parameters, self._attributes, strict=True
        ):
            module._parameters = parameters
            for name in set(vars(module)) - own:
                delattr(module, name)
        for parameter, value in self._values.items():
            for name in set(vars(parameter)) - self._own[parameter]:
                delattr(parameter, name)
            parameter.grad = None
            parameter.data = value
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
