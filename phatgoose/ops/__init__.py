"""The two operations of routed inference: choose experts for each token, and mix what they say."""

from phatgoose.ops.mixing import mix, mix_factors, mix_reference
from phatgoose.ops.routing import route, standardise, top_k_softmax

__all__ = ["mix", "mix_factors", "mix_reference", "route", "standardise", "top_k_softmax"]
