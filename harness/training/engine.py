"""Train an expert with DeepSpeed: one engine per job, with one rank or several."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

if torch.backends.mps.is_available():
    # By default, DeepSpeed would choose a Mac's GPU, where its collectives do not run.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from harness.training.whole_weights import WholeWeights
from phatgoose.inference.scoring import Score
from phatgoose.question import Question
from phatgoose.training.engine import (
    ADAM_STATE,
    TargetLoss,
    adam_state,
    copies,
    make_optimizer,
    make_scheduler,
    put,
    set_step,
)
from phatgoose.training.recipe import Recipe, Stage

# Training and evaluation run the model in different orders, so no weights are gathered before their
# use. Small weights are partitioned again after each use, too.
_STAGE_3 = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}


def start_deepspeed(store: dist.Store | None = None, rank: int = 0, ranks: int = 1) -> None:
    """Start DeepSpeed in this process, alone or as one of several ranks, and compile nothing.

    Args:
        store: the store where the ranks meet. A single rank needs none, and no port.
        rank: the number of this process among the ranks.
        ranks: the number of ranks.
    """
    if dist.is_initialized():
        return
    # At every step, DeepSpeed calls collectives by names that PyTorch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # On a CPU, DeepSpeed would compile a shared-memory collective for 40 s, even for one rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Each rank sees only the device that Ray assigned to it, if any.
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store or dist.HashStore(), rank=rank, world_size=ranks)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)


class DeepSpeedEngine:
    """A `phatgoose.training.engine.Engine` over a DeepSpeed engine. Call `start_deepspeed` first.

    ZeRO partitions among the ranks: nothing (stage 0), the optimizer state (1), also gradients (2),
    or also all weights, including those of the frozen base (3).
    """

    def __init__(
        self,
        module: TargetLoss,
        parameters: list[nn.Parameter],
        stage: Stage,
        recipe: Recipe,
        zero_stage: int = 0,
    ) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._parameters, self._stage, self._zero_stage = parameters, stage, zero_stage
        self._adam = make_optimizer(parameters, stage)
        self._scheduler = make_scheduler(self._adam, stage)
        self._whole = WholeWeights(module) if zero_stage == 3 else None
        self._engine: Any = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=self._adam,
            lr_scheduler=self._scheduler,
            dist_init_required=False,
            config={
                "train_batch_size": recipe.batch_size,
                "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
                "gradient_clipping": recipe.clip,
                "zero_optimization": {"stage": zero_stage, **(_STAGE_3 if self._whole else {})},
                # Weights keep their dtypes: the base its own, trained weights float32.
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )[0]
        # A single rank has nothing to sum, and would copy every gradient to a flat buffer and back.
        if self.ranks == 1 and zero_stage == 0:
            self._engine.enable_backward_allreduce = False

    def loss(self, questions: Sequence[Question]) -> Tensor:
        """Return the summed cross-entropy of a micro-batch's targets."""
        loss: Tensor = self._engine(questions)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Take an optimizer step after the last micro-batch of a batch."""
        self._engine.step()

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """Score the questions' first choices."""
        scores: list[Score] = self._engine(questions, scores=True)
        return scores

    def total(self, values: Sequence[float]) -> list[float]:
        """Return each value's sum over the ranks."""
        if self.ranks == 1:
            return list(values)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        summed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return summed.tolist()

    def weights(self) -> list[Tensor]:
        """Return copies of the trained weights."""
        if self._zero_stage == 3:
            return copies([safe_get_full_fp32_param(p) for p in self._parameters])
        return copies(self._parameters)

    def put_weights(self, weights: Sequence[Tensor]) -> None:
        """Replace the trained weights, and the optimizer's own copies of them."""
        with GatheredParameters(self._parameters, modifier_rank=0, enabled=self._zero_stage == 3):
            put(self._parameters, weights)
        for parameter, weight in zip(self._parameters, weights, strict=True):
            safe_set_full_fp32_param(parameter, weight.to(parameter.device))

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        """Return copies of AdamW's state of each weight."""
        return [
            {name: self._remembered(p, name).cpu().clone() for name in ADAM_STATE}
            for p in self._parameters
        ]

    def _remembered(self, parameter: nn.Parameter, name: str) -> Tensor:
        if self._zero_stage == 0:
            return self._adam.state[parameter][name]
        whole: Tensor = safe_get_full_optimizer_state(parameter, name)
        return whole.view(parameter.shape) if self._zero_stage < 3 else whole

    def resume(
        self, weights: Sequence[Tensor], optimizer: Sequence[dict[str, Tensor]], step: int
    ) -> None:
        """Resume training after `step` steps."""
        self.put_weights(weights)
        if self._zero_stage == 0:
            for parameter, remembered in zip(self._parameters, optimizer, strict=True):
                self._adam.state[parameter] = adam_state(parameter, step, remembered)
        else:
            self._resume_partitions(optimizer, step)
        set_step(self._adam, self._scheduler, self._stage, step)

    def _resume_partitions(self, optimizer: Sequence[dict[str, Tensor]], step: int) -> None:
        """Restore the part of the optimizer state that each rank holds."""
        zero = self._engine.optimizer
        if self._zero_stage == 3:
            partitions = zero.fp32_partitioned_groups_flat
        else:
            partitions = zero.single_partition_of_fp32_groups
        for flat in partitions:
            nothing = {name: torch.zeros_like(flat) for name in ADAM_STATE}
            self._adam.state[flat] = adam_state(flat, step, nothing)
        if self._zero_stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, remembered in zip(self._parameters, optimizer, strict=True):
            for name, whole in remembered.items():
                safe_set_full_optimizer_state(parameter, whole.to(parameter.device), name)

    def close(self) -> None:
        """Free what the engine holds, without the other ranks, because one may have failed."""
        self._engine.destroy()
        if self._whole:
            self._whole.restore()
