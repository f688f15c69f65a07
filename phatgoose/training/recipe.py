"""How an expert is trained: the numbers of the two stages."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from phatgoose.errors import PhatgooseError


@dataclass(frozen=True)
class Stage:
    """One of the two stages of training.

    Attributes:
        steps: optimizer steps.
        lr: learning rate after the warm-up.
        warmup: the fraction of the steps in which the rate grows linearly to `lr`.
    """

    steps: int = 1000
    lr: float = 5e-3
    warmup: float = 0.06

    def __post_init__(self) -> None:
        """Raise PhatgooseError if a value is invalid."""
        if self.steps < 1 or self.lr <= 0 or not 0 <= self.warmup <= 1:
            raise PhatgooseError(
                "a stage of training needs steps of at least 1, a positive lr and a warmup between "
                f"0 and 1, not steps={self.steps} lr={self.lr} warmup={self.warmup}"
            )

    def lr_factor(self, step: int) -> float:
        """Return what `lr` is multiplied by at a step, counted from 0."""
        return min(1.0, (step + 1) / max(1, math.ceil(self.steps * self.warmup)))


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained. The defaults are the paper's.

    Attributes:
        rank: LoRA rank R.
        scale: what `B A x` is multiplied by.
        init_std: standard deviation of A's start (B starts at zero).
        lora: the stage that trains A and B.
        gates: the stage that trains the gates; None trains none.
        batch_size: sequences per optimizer step.
        micro_batch_size: sequences per forward pass; divides `batch_size`.
        clip: the largest norm of a step's gradient.
        max_input_tokens: inputs are cut to it, and to what the base's positions leave.
        max_target_tokens: targets are cut to it, keeping the end-of-sequence token.
        max_examples: at most so many training examples are used.
        evaluation_examples: examples of the task's evaluation split to report on.
        validate_every: steps after which the loss on examples kept out of training is measured;
            the best state is kept. 0, or a stage with fewer steps: the last state is kept.
        validation_examples: how many to keep out, at most a tenth of the training examples.
        dtype: of the frozen base; bfloat16 also means autocast.
        seed: of A's start and of the order of the examples.
        retry_lr: what both rates are multiplied by for the one more try of a loss that diverged;
            0: there is none.
        gradient_checkpointing: compute each layer again in the backward pass instead of keeping
            what it computed. This saves memory and changes no result.
        sort_window: batches whose examples are sorted by length together, so that examples of
            similar length share a batch; 1: the batches are random.
    """

    rank: int = 16
    scale: float = 1 / 16
    init_std: float = 0.01
    lora: Stage = field(default_factory=Stage)
    gates: Stage | None = field(default_factory=lambda: Stage(steps=100))
    batch_size: int = 1024
    micro_batch_size: int = 8
    clip: float = 1.0
    max_input_tokens: int = 512
    max_target_tokens: int = 512
    max_examples: int = 500_000
    evaluation_examples: int = 1000
    validate_every: int = 100
    validation_examples: int = 500
    dtype: str = "bfloat16"
    seed: int = 42
    retry_lr: float = 0.0
    gradient_checkpointing: bool = False
    sort_window: int = 1

    def __post_init__(self) -> None:
        """Raise PhatgooseError if a value is invalid."""
        counts = ("rank", "batch_size", "micro_batch_size", "max_input_tokens", "max_target_tokens")
        for name in (*counts, "max_examples", "evaluation_examples", "sort_window"):
            if getattr(self, name) < 1:
                raise PhatgooseError(
                    f"recipe.{name} is {getattr(self, name)}: it must be at least 1"
                )
        if self.max_target_tokens < 2:
            raise PhatgooseError(
                f"recipe.max_target_tokens={self.max_target_tokens}: a target needs a token "
                "besides the end. Give at least 2."
            )
        if self.batch_size % self.micro_batch_size:
            raise PhatgooseError(
                f"recipe.micro_batch_size={self.micro_batch_size} does not divide "
                f"recipe.batch_size={self.batch_size}"
            )
        if not 0 <= self.retry_lr < 1:
            raise PhatgooseError(
                f"recipe.retry_lr is {self.retry_lr}: it must be less than 1, and 0 for no retry"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise PhatgooseError(f"recipe.dtype is {self.dtype!r}: float32 or bfloat16")

    def identity(self) -> dict[str, Any]:
        """Return the values that identify what is trained with this recipe.

        Memory is not part of it. A field that version 0.1.0 did not have is, unless it has its
        default, so that the experts of that version stay valid.
        """
        values = asdict(self)
        del values["gradient_checkpointing"]
        if self.sort_window == 1:
            del values["sort_window"]
        return values

    def at_lower_rate(self) -> "Recipe":
        """Return the recipe for the one retry."""
        gates = self.gates and replace(self.gates, lr=self.gates.lr * self.retry_lr)
        return replace(self, lora=replace(self.lora, lr=self.lora.lr * self.retry_lr), gates=gates)

    def with_half_micro_batch(self) -> "Recipe | None":
        """Return the recipe with half as many sequences per forward pass; None if it has one."""
        if self.micro_batch_size % 2:
            return None
        return replace(self, micro_batch_size=self.micro_batch_size // 2)

    @property
    def validates(self) -> bool:
        """Whether any state is measured on examples kept out of training."""
        return 0 < self.validate_every <= max(stage.steps for stage in self.stages)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that there are."""
        return (self.lora,) if self.gates is None else (self.lora, self.gates)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // self.micro_batch_size
