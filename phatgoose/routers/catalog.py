"""Find routers by name.

The package fills `ROUTERS`; wrappers find their inner routers here.
"""

import dataclasses
from typing import Any

from phatgoose.errors import PhatgooseError, did_you_mean
from phatgoose.routers.interface import Router

ROUTERS: dict[str, type[Router]] = {}


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
        hint = f"{did_you_mean(kind, ROUTERS)} there are {', '.join(sorted(ROUTERS))}".strip()
        raise PhatgooseError(f"no router {name!r}: {hint}")
    fields = [field.name for field in dataclasses.fields(ROUTERS[kind])]  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            raise PhatgooseError(f"router {kind} has no option {option!r}; it has {fields}")
    if kind == "single" and not options.get("expert"):
        raise PhatgooseError("router single needs an expert: call it single:<expert>")
    router = ROUTERS[kind](**options)
    router.check_options()
    return router
