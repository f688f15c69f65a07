"""The router `multitask`: one expert outside the pool."""

from dataclasses import dataclass
from typing import ClassVar

from phatgoose.routers.single import Single


@dataclass(frozen=True)
class Multitask(Single):
    """The expert that was trained on all the pool's data together, for every token.

    Not post-hoc: it needs all the data at once. It is no member of the pool.
    """

    side_information: ClassVar[str | None] = "all training data at once (it is not post-hoc)"
