"""The method: LoRA experts, their gates, and routers over pools of them (no Ray, no Hydra).

What a user needs most stands here by name, and is imported when it is first asked for: a
configuration is refused in a second, without waiting for transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phatgoose.authors import read_checkpoint
    from phatgoose.base import Base, load_base
    from phatgoose.errors import PhatgooseError
    from phatgoose.expert import Card, Expert, LoraFactors
    from phatgoose.model import RoutedModel
    from phatgoose.pool import Pool
    from phatgoose.profile import Profile, ProfileConfig
    from phatgoose.profiling import measure_profile
    from phatgoose.query import Query
    from phatgoose.recipe import Recipe, Stage
    from phatgoose.routed_linear import RoutingLog, TokenLog
    from phatgoose.routers import ROUTERS, make_router
    from phatgoose.scoring import Question, Score
    from phatgoose.training import Example, train_expert, train_gates
    from phatgoose.view import to_html, to_terminal, token_routes

_HOMES = {
    "authors": ("read_checkpoint",),
    "base": ("Base", "load_base"),
    "errors": ("PhatgooseError",),
    "expert": ("Card", "Expert", "LoraFactors"),
    "model": ("RoutedModel",),
    "pool": ("Pool",),
    "profile": ("Profile", "ProfileConfig"),
    "profiling": ("measure_profile",),
    "query": ("Query",),
    "recipe": ("Recipe", "Stage"),
    "routed_linear": ("RoutingLog", "TokenLog"),
    "routers": ("ROUTERS", "make_router"),
    "scoring": ("Question", "Score"),
    "training": ("Example", "train_expert", "train_gates"),
    "view": ("to_html", "to_terminal", "token_routes"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ROUTERS",
    "Base",
    "Card",
    "Example",
    "Expert",
    "LoraFactors",
    "PhatgooseError",
    "Pool",
    "Profile",
    "ProfileConfig",
    "Query",
    "Question",
    "Recipe",
    "RoutedModel",
    "RoutingLog",
    "Score",
    "Stage",
    "TokenLog",
    "load_base",
    "make_router",
    "measure_profile",
    "read_checkpoint",
    "to_html",
    "to_terminal",
    "token_routes",
    "train_expert",
    "train_gates",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"phatgoose.{_HOME_OF[name]}"), name)
    if name == "ops":
        return import_module("phatgoose.ops")
    raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")
