"""Routers: rules that pick experts. One file each; `make_router` finds them by name."""

from phatgoose.routers.ariadne import Ariadne
from phatgoose.routers.arrow import Arrow
from phatgoose.routers.average_activation import AverageActivation
from phatgoose.routers.catalog import ROUTERS, make_router
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

ROUTERS |= {
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
