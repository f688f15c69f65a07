"""A pool: the experts of one base, stacked per linear, as routed inference reads them.

Shape suffixes: E experts, R LoRA rank (the largest of the pool), D input and O output features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert


@dataclass(frozen=True)
class PoolLinear:
    """All experts' factors on one linear.

    Attributes:
        lora_A_ERD: every expert's A.
        lora_B_EOR: every expert's B times its scale, so that an expert adds `B A x`.
        gate_ED: every expert's gate; None if any expert has none.
    """

    lora_A_ERD: Tensor
    lora_B_EOR: Tensor
    gate_ED: Tensor | None


@dataclass(frozen=True)
class Pool:
    """Experts of one base.

    Attributes:
        base_fingerprint: the base they were trained on.
        experts: their names; an expert's index below is its place here.
        linears: stacked factors by the linear's name, in the model's order.
    """

    base_fingerprint: str
    experts: tuple[str, ...]
    linears: dict[str, PoolLinear]

    @staticmethod
    def from_experts(experts: Sequence[Expert]) -> "Pool":
        """Stack experts, in the order given.

        Raises:
            PhatgooseError: there are none, or they differ in base, linears or shapes, or share a
                name.
        """
        if not experts:
            raise PhatgooseError("a pool needs at least one expert")
        first = experts[0]
        names = [expert.card.name for expert in experts]
        if len(set(names)) < len(names):
            raise PhatgooseError(f"two experts of the pool have one name: {sorted(names)}")
        for expert in experts[1:]:
            _check_alike(first, expert)
        linears = {linear: _stack(linear, experts) for linear in first.linears}
        return Pool(first.card.base_fingerprint, tuple(names), linears)

    def save(self, folder: Path) -> None:
        """Write the pool as one safetensors file that `open` maps."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, linear in self.linears.items():
            tensors[f"{name}.lora_A"] = linear.lora_A_ERD
            tensors[f"{name}.lora_B"] = linear.lora_B_EOR
            if linear.gate_ED is not None:
                tensors[f"{name}.gate"] = linear.gate_ED
        metadata = {
            "base_fingerprint": self.base_fingerprint,
            "experts": json.dumps(self.experts),
            "linears": json.dumps(list(self.linears)),
        }
        save_file(tensors, folder / "pool.safetensors", metadata=metadata)

    @staticmethod
    def open(folder: Path) -> "Pool":
        """Map a saved pool: processes of one machine share its pages.

        Raises:
            PhatgooseError: there is no pool in the folder, or its file is damaged.
        """
        path = folder / "pool.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                metadata, keys = file.metadata(), set(file.keys())
                linears = {
                    name: PoolLinear(
                        lora_A_ERD=file.get_tensor(f"{name}.lora_A"),
                        lora_B_EOR=file.get_tensor(f"{name}.lora_B"),
                        gate_ED=file.get_tensor(f"{name}.gate") if f"{name}.gate" in keys else None,
                    )
                    for name in json.loads(metadata["linears"])
                }
        except (OSError, SafetensorError) as error:
            raise PhatgooseError(
                f"cannot open the pool {path} ({error}): delete it and save it again"
            ) from error
        experts = tuple(json.loads(metadata["experts"]))
        return Pool(metadata["base_fingerprint"], experts, linears)

    def index(self, expert: str) -> int:
        """The place of an expert; PhatgooseError if the pool has none of that name."""
        if expert not in self.experts:
            raise PhatgooseError(
                f"the pool has no expert {expert!r}; it has {', '.join(self.experts)}"
            )
        return self.experts.index(expert)


def _check_alike(first: Expert, other: Expert) -> None:
    pair = f"experts {first.card.name!r} and {other.card.name!r}"
    if first.card.base_fingerprint != other.card.base_fingerprint:
        raise PhatgooseError(f"{pair} were trained on different bases: they cannot share a pool")
    if set(first.linears) != set(other.linears):
        different = sorted(set(first.linears) ^ set(other.linears))
        raise PhatgooseError(f"{pair} adapt different linears, such as {different[0]}")
    for linear, factors in first.linears.items():
        others = other.linears[linear]
        if (
            factors.lora_A_RD.shape[1] != others.lora_A_RD.shape[1]
            or factors.lora_B_OR.shape[0] != others.lora_B_OR.shape[0]
        ):
            raise PhatgooseError(f"{pair} have different shapes on {linear}")


def _stack(linear: str, experts: Sequence[Expert]) -> PoolLinear:
    factors = [expert.linears[linear] for expert in experts]
    rank = max(f.lora_A_RD.shape[0] for f in factors)
    lora_A = [f.lora_A_RD for f in factors]
    lora_B = [f.lora_B_OR * e.card.scale for f, e in zip(factors, experts, strict=True)]
    # Zeros fill up lower ranks: they add nothing to `B A x`.
    padded_A = [torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])) for a in lora_A]
    padded_B = [torch.nn.functional.pad(b, (0, rank - b.shape[1])) for b in lora_B]
    gates = [f.gate_D for f in factors if f.gate_D is not None]
    return PoolLinear(
        lora_A_ERD=torch.stack(padded_A),
        lora_B_EOR=torch.stack(padded_B),
        gate_ED=torch.stack(gates) if len(gates) == len(factors) else None,
    )
