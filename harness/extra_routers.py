"""Routers that only exist in runs: an expert outside the pool, and rows derived from others."""

from dataclasses import dataclass
from typing import ClassVar

from phatgoose.routers.single import Single

# Name of the expert trained on all of the pool's data, and of the router that uses it alone.
MULTITASK = "multitask"
# Prefix of the names of routers that use a single expert of the pool.
SINGLE = "single:"
ORACLE = "oracle"
BEST_INDIVIDUAL = "best_individual"
# Routers whose rows are derived from the rows of single experts.
DERIVED = (ORACLE, BEST_INDIVIDUAL)


@dataclass(frozen=True)
class Multitask(Single):
    """The expert that was trained on all of the pool's data together, for every token.

    It is not post-hoc, since it needs all the data at once. It is not a member of the pool.
    """

    side_information: ClassVar[str | None] = "all training data at once (it is not post-hoc)"
