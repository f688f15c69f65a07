"""Measure an expert's profile: what some routers need besides its weights.

Shape suffixes: B rows, L positions, D input features of a linear, T tokens, Q examples of a batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phatgoose.architecture import Architecture
from phatgoose.base import Base
from phatgoose.devices import off_mps
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.forward_context import ForwardContext
from phatgoose.inference.model import RoutedModel
from phatgoose.ops.svd import output_projection
from phatgoose.pool import Pool
from phatgoose.profile import Profile, ProfileConfig
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers.single import Single
from phatgoose.sentence_encoder import load_encoder
from phatgoose.training.train import Example


def measure_profile(
    base: Base,
    expert: Expert,
    examples: Sequence[Example],
    config: ProfileConfig,
    description: str = "",
    beat: Callable[[], None] = lambda: None,
) -> Profile:
    """Measure what routers need on examples of an expert's task; the base is left as it was.

    Args:
        base: the base, with nothing attached.
        expert: the expert; it is attached at full strength, without its gate.
        examples: training examples of its task; the first ones are used.
        config: how many of them, and which sentence encoder.
        description: what the task is about; if empty, the beginnings of some inputs replace it.
        beat: called after every batch, as a sign of life.

    Raises:
        PhatgooseError: there are no examples, or the sentence encoder is unavailable.
    """
    if not examples:
        raise PhatgooseError(f"expert {expert.card.name}: a profile needs examples of its task")
    encoder = load_encoder(config.encoder)
    texts = [
        Query(example.input, example.choices).retrieval_text
        for example in examples[: config.embedded_examples]
    ]
    model = RoutedModel(base, Pool.from_experts([expert]), Single(expert.card.name))
    try:
        statistics = _listen(model, expert, examples[: config.activation_examples], config, beat)
    finally:
        model.detach()
    return Profile(
        mean_activation=statistics.mean_activation(),
        norms=statistics.norms(),
        embeddings_NS=encoder.encode(texts),
        encoder=config.encoder,
        encoder_fingerprint=encoder.fingerprint,
        description=description or _describe(expert.card.task, examples),
    )


def _describe(task: str, examples: Sequence[Example]) -> str:
    """Make up for a missing description: the task's name and how some of its inputs begin."""
    inputs = " | ".join(" ".join(example.input.split())[:100] for example in examples[:3])
    return f"{task.replace('_', ' ')}: {inputs}"


def _listen(
    model: RoutedModel,
    expert: Expert,
    examples: Sequence[Example],
    config: ProfileConfig,
    beat: Callable[[], None],
) -> "_Statistics":
    """Run the examples through the model, and listen to the input of each adapted linear."""
    limits = config.max_input_tokens, config.max_target_tokens
    asked = [(example.input, [example.target], Query(example.input)) for example in examples]
    questions = Question.encode_all(model.base, asked, *limits)
    questions.sort(key=lambda question: question.length)
    statistics = _Statistics(model.forward_context, model.base.architecture, expert)
    model.forward_context.apart = True  # a token that examples share would have one mean only
    with model.listening(statistics.hear):
        for start in range(0, len(questions), config.batch_size):
            model.score(questions[start : start + config.batch_size])
            statistics.end_batch()
            beat()
    return statistics


class _Statistics:
    """Sums over the tokens that each linear has read, padding left out."""

    def __init__(self, forward: ForwardContext, architecture: Architecture, expert: Expert) -> None:
        self._forward, self._architecture = forward, architecture
        self._projections = {
            name: output_projection(f.lora_A_RD[None], f.lora_B_OR[None] * expert.card.scale)[0]
            for name, f in expert.linears.items()
        }
        self._sums: dict[str, Tensor] = {}  # of the current batch, [Q, D]
        self._counts: dict[str, Tensor] = {}  # and its tokens, [Q]
        self._means: dict[str, Tensor] = {}  # of the examples before, summed, [D]
        # Of all tokens: how many, and the sums of their norms and of the squares, float64 [3].
        self._norms: dict[str, Tensor] = {}
        self._examples = 0

    def hear(self, linear: str, x: Tensor) -> None:
        """Count the tokens of one call of a linear, whose input is [B, L, D] or [B * L, D]."""
        side = self._architecture.side_of(linear)
        mask_BL, queries_BL = self._forward.masks[side].bool(), self._forward.queries[side]
        query_T = queries_BL[mask_BL]
        x_TD = x.reshape(*mask_BL.shape, -1)[mask_BL].float()
        questions = int(self._forward.queries[side].max()) + 1
        sum_QD = self._sums.setdefault(linear, x_TD.new_zeros(questions, x_TD.shape[1]))
        sum_QD.index_add_(0, query_T, x_TD)
        count_Q = self._counts.setdefault(linear, x_TD.new_zeros(questions))
        count_Q.index_add_(0, query_T, torch.ones_like(query_T, dtype=count_Q.dtype))
        along_TR = x_TD @ self._projections[linear].to(x_TD.device).T
        norm_T = off_mps(along_TR.norm(dim=-1))[0].double()
        sums = torch.stack([torch.ones_like(norm_T), norm_T, norm_T**2]).sum(dim=1)
        self._norms[linear] = self._norms.get(linear, torch.zeros_like(sums)) + sums

    def end_batch(self) -> None:
        """Average over each example's tokens."""
        for linear, sum_QD in self._sums.items():
            mean_D = (sum_QD / self._counts[linear].unsqueeze(1)).sum(dim=0)
            self._means[linear] = self._means.get(linear, torch.zeros_like(mean_D)) + mean_D
        self._examples += len(next(iter(self._counts.values())))
        self._sums, self._counts = {}, {}

    def mean_activation(self) -> dict[str, Tensor]:
        """Per linear, the mean over examples, float32 [D]."""
        return {name: (sum_D / self._examples).cpu() for name, sum_D in self._means.items()}

    def norms(self) -> dict[str, Tensor]:
        """Per linear, mean and standard deviation over all tokens, float32 [2]."""
        found = {}
        for name, (count, total, squares) in self._norms.items():
            mean = total / count
            std = (squares / count - mean**2).clamp(min=0).sqrt()
            found[name] = torch.stack([mean, std]).float().cpu()
        return found
