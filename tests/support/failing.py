"""A training actor whose machine has little memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.training.actor import TrainActor
from phatgoose.question import Question


class ShortOfMemory(TrainActor):
    """An actor that runs out of memory with more than two sequences at a time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from harness.training.engine import DeepSpeedEngine

        class Engine(DeepSpeedEngine):
            def loss(self, questions: Sequence[Question]) -> Tensor:
                if len(questions) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
                return super().loss(questions)

        self._engine = Engine
