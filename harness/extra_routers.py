"""Routers that only a run has: one expert outside the pool, and rows derived from other rows."""

from dataclasses import dataclass
from typing import ClassVar

from phatgoose.routers.single import Single

# The name of the expert that is trained on all the pool's data, and of the router that is only it.
MULTITASK = "multitask"
# The beginning of the name of a router that is one expert of the pool.
SINGLE = "single:"
ORACLE = "oracle"
BEST_INDIVIDUAL = "best_individual"
# Routers whose rows are read off from those of the single experts.
DERIVED = (ORACLE, BEST_INDIVIDUAL)


@dataclass(frozen=True)
class Multitask(Single):
    """The expert that was trained on all the pool's data together, for every token.

    Not post-hoc: it needs all the data at once. It is no member of the pool.
    """

    side_information: ClassVar[str | None] = "all training data at once (it is not post-hoc)"
