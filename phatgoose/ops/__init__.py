"""The two operations of routed inference: choose experts for each token, and mix what they say."""

from phatgoose.ops.mixing import mix, mix_factors, mix_reference, packed
from phatgoose.ops.routed import RoutedExperts
from phatgoose.ops.routing import TokenRule, route, standardise, top_k_softmax

__all__ = [
    "RoutedExperts",
    "TokenRule",
    "mix",
    "mix_factors",
    "mix_reference",
    "packed",
    "route",
    "standardise",
    "top_k_softmax",
]
