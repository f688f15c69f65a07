"""The base and the random experts that benchmarks share."""

import torch

from phatgoose.architecture import find_linear, linear_sizes
from phatgoose.base import Base, load_base
from phatgoose.ops.frozen_linear import use_plain_products
from phatgoose.pool import Pool, PoolLinear

BASE = "smollm2-135m"
RANK = 16


def random_pool(
    base: Base, experts: int, *, rank: int = RANK, scale: float = 0.02, seed: int = 0
) -> Pool:
    """Return experts on all linears whose factors and gates are drawn from normal distributions.

    Args:
        base: the base.
        experts: how many.
        rank: of all of them.
        scale: standard deviation of B; those of A keep the size of an input. Outputs should be
            small beside the base's, so that activations stay what a model reads.
        seed: of all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for name in base.linears:
        inputs, outputs = linear_sizes(find_linear(base.model, name))
        lora_A_EDR = torch.randn(experts, inputs, rank, generator=generator) / inputs**0.5
        lora_B_ERO = torch.randn(experts, rank, outputs, generator=generator) * scale
        gate_ED = torch.randn(experts, inputs, generator=generator)
        linears[name] = PoolLinear(lora_A_EDR.transpose(1, 2), lora_B_ERO.transpose(1, 2), gate_ED)
    return Pool(base.fingerprint, tuple(f"e{i}" for i in range(experts)), linears)


def plain_base(name: str = BASE) -> Base:
    """Return a base as transformers computes it: what other packages are given."""
    base = load_base(name)
    use_plain_products(base.model)
    return base
