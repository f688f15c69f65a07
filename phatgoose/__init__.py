"""The method: LoRA experts, their gates, and routers over pools of them (no Ray, no Hydra).

The public names are listed here and imported on first use, so `import phatgoose` does not load
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phatgoose.base import Base, load_base
    from phatgoose.card import Card, LoraFactors
    from phatgoose.errors import PhatgooseError
    from phatgoose.expert import Expert, read_checkpoint
    from phatgoose.inference.model import RoutedModel
    from phatgoose.inference.routed_linear import RoutingLog, TokenLog
    from phatgoose.inference.scoring import Score
    from phatgoose.inference.token_view import to_html, to_terminal, token_routes
    from phatgoose.pool import Pool
    from phatgoose.profile import Profile, ProfileConfig
    from phatgoose.profile_measurement import measure_profile
    from phatgoose.query import Query
    from phatgoose.question import Question
    from phatgoose.routers import ROUTERS, make_router
    from phatgoose.training.recipe import Recipe, Stage
    from phatgoose.training.train import Example, Hooks, train_expert, train_gates

_HOMES = {
    "base": ("Base", "load_base"),
    "errors": ("PhatgooseError",),
    "card": ("Card", "LoraFactors"),
    "expert": ("Expert", "read_checkpoint"),
    "inference.model": ("RoutedModel",),
    "inference.routed_linear": ("RoutingLog", "TokenLog"),
    "inference.scoring": ("Score",),
    "inference.token_view": ("to_html", "to_terminal", "token_routes"),
    "pool": ("Pool",),
    "profile": ("Profile", "ProfileConfig"),
    "profile_measurement": ("measure_profile",),
    "query": ("Query",),
    "question": ("Question",),
    "routers": ("ROUTERS", "make_router"),
    "training.recipe": ("Recipe", "Stage"),
    "training.train": ("Example", "Hooks", "train_expert", "train_gates"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ROUTERS",
    "Base",
    "Card",
    "Example",
    "Expert",
    "Hooks",
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
