"""Routers: rules that pick experts. One file each; `make_router` finds them by name."""

import dataclasses
import difflib
from typing import Any

from phatgoose.errors import PhatgooseError
from phatgoose.routers.interface import Merge, Router, TokenRouter
from phatgoose.routers.merged import Merged
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.random import Random
from phatgoose.routers.single import Single

ROUTERS: dict[str, type[Router]] = {
    "base": NoExpert,
    "merged": Merged,
    "phatgoose": Phatgoose,
    "random": Random,
    "single": Single,
}

__all__ = ["ROUTERS", "Merge", "Router", "TokenRouter", "make_router"]


def make_router(name: str, **options: Any) -> Router:
    """Build a router by name.

    Args:
        name: a key of `ROUTERS`, or `single:<expert>`.
        options: the fields of that router's class.

    Raises:
        PhatgooseError: there is no such router, or it has no such option or value.
    """
    kind, _, expert = name.partition(":")
    if expert:
        options = {"expert": expert, **options}
    if kind not in ROUTERS or (expert and kind != "single"):
        near = difflib.get_close_matches(kind, ROUTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PhatgooseError(f"no router {name!r}: {hint}there are {', '.join(sorted(ROUTERS))}")
    fields = [field.name for field in dataclasses.fields(ROUTERS[kind])]  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            raise PhatgooseError(f"router {kind} has no option {option!r}; it has {fields}")
    if kind == "single" and not options.get("expert"):
        raise PhatgooseError("router single needs an expert: call it single:<expert>")
    if options.get("top_k", 1) < 1:
        raise PhatgooseError(f"router {kind}: top_k is {options['top_k']}: it must be at least 1")
    return ROUTERS[kind](**options)
