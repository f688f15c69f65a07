"""Tiny experts for the tests of registries."""

import torch

from phatgoose.card import Card, LoraFactors
from phatgoose.expert import Expert

BASE, OTHER_BASE = "ba5e" * 16, "0e4f" * 16


def make_expert(
    number: int, *, value: float = 1.0, name: str | None = None, base: str = BASE
) -> Expert:
    """Make a tiny expert of job `number`; another `value` gives other content."""
    card = Card(
        name=name or f"task-{number}",
        task="task",
        base="tiny",
        base_fingerprint=base,
        data_fingerprint="da7a" * 16,
        job=f"{number:016x}",
        scale=0.5,
        recipe={"seed": number},
        metrics={},
    )
    A = torch.full((2, 4), value)
    return Expert(card, {"layers.0.q": LoraFactors(A, torch.ones(3, 2), torch.ones(4))})
