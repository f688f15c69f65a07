"""DeepSpeed as the engine that trains an expert: one job is one engine of one rank."""

import os
from collections.abc import Sequence
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn

from phatgoose.engine import TargetLoss, make_optimizer, make_scheduler
from phatgoose.recipe import Recipe, Stage
from phatgoose.scoring import Question


def start_deepspeed() -> None:
    """Make this process a DeepSpeed group of its own, without a port and without compiling."""
    if dist.is_initialized():
        return
    # On a CPU, DeepSpeed would compile a shared-memory collective: 40 s, for a single rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)


class DeepSpeedEngine:
    """A `phatgoose.training.Engine` over a DeepSpeed engine; call `start_deepspeed` before."""

    def __init__(
        self, module: TargetLoss, parameters: list[nn.Parameter], stage: Stage, recipe: Recipe
    ) -> None:
        optimizer = make_optimizer(parameters, stage)
        self._engine: Any = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=make_scheduler(optimizer, stage),
            dist_init_required=False,
            config={
                "train_batch_size": recipe.batch_size,
                "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
                "gradient_clipping": recipe.clip,
                "zero_optimization": {"stage": 0},
                # Weights keep their own types: the base its own, what is trained float32.
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )[0]

    def loss(self, questions: Sequence[Question]) -> Tensor:
        """The summed cross-entropy of a micro-batch's targets."""
        loss: Tensor = self._engine(questions)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Take an optimiser step after the last micro-batch of a batch."""
        self._engine.step()

    def close(self) -> None:
        """Free what the engine holds."""
        self._engine.destroy()
