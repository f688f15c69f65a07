"""No expert: the base alone, under the name `base`."""

from dataclasses import dataclass

from phatgoose.routers.interface import Router


@dataclass(frozen=True)
class NoExpert(Router):
    """Leaves every linear as it is: what the base does without help."""

    @classmethod
    def name(cls) -> str:
        """Return the router's name."""
        return "base"
