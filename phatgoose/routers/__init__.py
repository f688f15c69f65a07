"""Routers: rules that pick experts. One file each; `make_router` finds them by name."""

import dataclasses
from typing import Any

from phatgoose.errors import PhatgooseError, did_you_mean
from phatgoose.routers.ariadne import Ariadne
from phatgoose.routers.arrow import Arrow
from phatgoose.routers.average_activation import AverageActivation
from phatgoose.routers.dare import Dare
from phatgoose.routers.genknowsub import Genknowsub
from phatgoose.routers.glider import Glider
from phatgoose.routers.interface import (
    Merge,
    QueryRouter,
    Router,
    TokenRouter,
    Wrapper,
    all_needs,
)
from phatgoose.routers.lag import Lag
from phatgoose.routers.logo import Logo
from phatgoose.routers.lorauter import Lorauter
from phatgoose.routers.merged import Merged
from phatgoose.routers.merged_factors import MergedFactors
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.random import Random
from phatgoose.routers.random_experts import RandomExperts
from phatgoose.routers.retrieval import Retrieval
from phatgoose.routers.seqr import Seqr
from phatgoose.routers.single import Single
from phatgoose.routers.spectr import Spectr
from phatgoose.routers.task_arithmetic import TaskArithmetic
from phatgoose.routers.ties import Ties
from phatgoose.routers.uniform import Uniform

ROUTERS: dict[str, type[Router]] = {
    "ariadne": Ariadne,
    "arrow": Arrow,
    "average_activation": AverageActivation,
    "base": NoExpert,
    "dare": Dare,
    "genknowsub": Genknowsub,
    "glider": Glider,
    "lag": Lag,
    "logo": Logo,
    "lorauter": Lorauter,
    "merged": Merged,
    "merged_factors": MergedFactors,
    "phatgoose": Phatgoose,
    "random": Random,
    "random_experts": RandomExperts,
    "retrieval": Retrieval,
    "seqr": Seqr,
    "single": Single,
    "spectr": Spectr,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "uniform": Uniform,
}

__all__ = [
    "ROUTERS",
    "Merge",
    "QueryRouter",
    "Router",
    "TokenRouter",
    "Wrapper",
    "all_needs",
    "make_router",
]


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
    if kind in ("oracle", "best_individual", "multitask"):
        raise PhatgooseError(
            f"router {kind} exists in the harness only: it needs a whole evaluation"
        )
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
