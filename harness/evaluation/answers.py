"""What evaluation actors answer: scores, texts, and where tokens were routed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from phatgoose.inference.scoring import Score


@dataclass
class Answer:
    """The answer to some requests: of a chunk, a shard or a task.

    Attributes:
        scores: per request, a Score per choice. For kind `generate`, the Score of the correct
            answer, or none.
        texts: per request, the generated text; empty for kind `score`.
        tokens: the number of tokens run through the model.
        seconds: the time taken.
        routing: per linear, the summed routing weight of each expert, float64 [E].
        routed: per linear, the number of routed tokens.
        cut: places of the requests whose prompt was cut to the base's positions.
        failed: why a request could not be answered, by its place. It has no scores and no text.
    """

    scores: list[list[Score]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    routing: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


def joined(parts: Iterable[Answer]) -> Answer:
    """Return the answer to the requests of all parts, in their order; sums go in this order too."""
    whole = Answer()
    for part in parts:
        before = len(whole.texts)
        whole.scores += part.scores
        whole.texts += part.texts
        whole.tokens += part.tokens
        whole.seconds += part.seconds
        whole.cut += [before + place for place in part.cut]
        whole.failed |= {before + place: reason for place, reason in part.failed.items()}
        for linear, weights_E in part.routing.items():
            total_E = whole.routing.setdefault(linear, torch.zeros_like(weights_E))
            total_E += weights_E
            whole.routed[linear] = whole.routed.get(linear, 0) + part.routed[linear]
    return whole
