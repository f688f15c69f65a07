"""Pools of random experts for benchmarks."""

import torch

from phatgoose.architecture import find_linear, linear_sizes
from phatgoose.base import Base
from phatgoose.pool import Pool, PoolLinear

RANK = 16


def random_pool(base: Base, experts: int, rank: int = RANK, seed: int = 0) -> Pool:
    """Return experts on all linears whose factors and gates are drawn from normal distributions.

    Their outputs are small beside the base's, so that activations stay what a model reads.
    """
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for name in base.linears:
        inputs, outputs = linear_sizes(find_linear(base.model, name))
        lora_A_EDR = torch.randn(experts, inputs, rank, generator=generator) / inputs**0.5
        lora_B_ERO = torch.randn(experts, rank, outputs, generator=generator) * 0.02
        gate_ED = torch.randn(experts, inputs, generator=generator)
        linears[name] = PoolLinear(lora_A_EDR.transpose(1, 2), lora_B_ERO.transpose(1, 2), gate_ED)
    return Pool(base.fingerprint, tuple(f"e{i}" for i in range(experts)), linears)
