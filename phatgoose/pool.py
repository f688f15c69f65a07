"""A pool: the experts of one base, stacked per linear, as routed inference reads them.

Shape suffixes: E experts, R LoRA rank (the largest of the pool), D input and O output features.

Factors lie in memory as mixing reads them fastest, see `phatgoose.ops.packed`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phatgoose.errors import PhatgooseError, did_you_mean
from phatgoose.expert import Expert
from phatgoose.ops import packed
from phatgoose.profile import Profile


@dataclass(frozen=True)
class PoolLinear:
    """All experts' factors on one linear.

    Attributes:
        lora_A_ERD: every expert's A.
        lora_B_EOR: every expert's B times its scale, so that an expert adds `B A x`.
        gate_ED: every expert's gate; None if an expert that adapts this linear has none.
        absent_E: True for experts that do not adapt this linear, whose rows above are zeros and
            which no router sends a token to; None if there are none.
    """

    lora_A_ERD: Tensor
    lora_B_EOR: Tensor
    gate_ED: Tensor | None = None
    absent_E: Tensor | None = None


@dataclass(frozen=True, repr=False)
class Pool:
    """Experts of one base.

    Attributes:
        base_fingerprint: the base they were trained on.
        experts: their names; an expert's index below is its place here.
        linears: stacked factors by the linear's name, for every linear that any expert adapts.
        profiles: what some routers need to know of each expert; None if they were not measured.
    """

    base_fingerprint: str
    experts: tuple[str, ...]
    linears: dict[str, PoolLinear]
    profiles: tuple[Profile, ...] | None = None

    @staticmethod
    def from_experts(experts: Sequence[Expert]) -> "Pool":
        """Stack experts, in the order given; they may differ in rank and in the linears they adapt.

        Raises:
            PhatgooseError: there are none, or they differ in base or in a linear's shape, or share
                a name.
        """
        if not experts:
            raise PhatgooseError("a pool needs at least one expert")
        first = experts[0]
        names = [expert.card.name for expert in experts]
        if len(set(names)) < len(names):
            raise PhatgooseError(f"two experts of the pool have one name: {sorted(names)}")
        for expert in experts[1:]:
            if expert.card.base_fingerprint != first.card.base_fingerprint:
                raise PhatgooseError(
                    f"experts {first.card.name!r} and {expert.card.name!r} were made with "
                    "different bases: they cannot share a pool"
                )
        adapted = dict.fromkeys(linear for expert in experts for linear in expert.linears)
        linears = {linear: _stack(linear, experts) for linear in adapted}
        return Pool(first.card.base_fingerprint, tuple(names), linears)

    def with_profiles(self, profiles: Sequence[Profile]) -> "Pool":
        """Return the same pool with a profile for each expert, in its order.

        Raises:
            PhatgooseError: there is not one for each, or they come from different encoders.
        """
        if len(profiles) != len(self.experts):
            raise PhatgooseError(f"{len(profiles)} profiles for {len(self.experts)} experts")
        if len({profile.encoder_fingerprint for profile in profiles}) > 1:
            raise PhatgooseError(
                "the profiles' embeddings come from different encoders: measure them with one"
            )
        return replace(self, profiles=tuple(profiles))

    def __repr__(self) -> str:
        """Return the names of its experts, without the tensors."""
        return f"Pool({', '.join(self.experts)}; {len(self.linears)} linears)"

    def save(self, folder: str | Path) -> None:
        """Write the pool as one safetensors file that `open` maps; profiles are left out."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, linear in self.linears.items():
            tensors[f"{name}.lora_A_EDR"] = linear.lora_A_ERD.transpose(1, 2).contiguous()
            tensors[f"{name}.lora_B_ERO"] = linear.lora_B_EOR.transpose(1, 2).contiguous()
            if linear.gate_ED is not None:
                tensors[f"{name}.gate"] = linear.gate_ED
            if linear.absent_E is not None:
                tensors[f"{name}.absent"] = linear.absent_E
        metadata = {
            "base_fingerprint": self.base_fingerprint,
            "experts": json.dumps(self.experts),
            "linears": json.dumps(list(self.linears)),
        }
        save_file(tensors, folder / "pool.safetensors", metadata=metadata)
        (folder / "pool.safetensors").chmod(0o644)  # others may map it too

    @staticmethod
    def open(folder: str | Path) -> "Pool":
        """Map a saved pool: processes of one machine share its pages.

        Raises:
            PhatgooseError: there is no pool in the folder, or its file is damaged.
        """
        path = Path(folder) / "pool.safetensors"
        if not path.exists():
            raise PhatgooseError(
                f"there is no {path}: give a folder that Pool.save wrote, in a registry packs/<id>"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata, keys = file.metadata(), set(file.keys())
                fingerprint = metadata["base_fingerprint"]
                experts = tuple(json.loads(metadata["experts"]))

                def read(key: str) -> Tensor | None:
                    return file.get_tensor(key) if key in keys else None

                def factors(name: str) -> tuple[Tensor, Tensor]:
                    if (
                        f"{name}.lora_A" in keys
                    ):  # as version 0.1.0 wrote them: [E, R, D], [E, O, R]
                        return packed(*(file.get_tensor(f"{name}.lora_{f}") for f in "AB"))
                    lora_A_EDR = file.get_tensor(f"{name}.lora_A_EDR")
                    lora_B_ERO = file.get_tensor(f"{name}.lora_B_ERO")
                    return lora_A_EDR.transpose(1, 2), lora_B_ERO.transpose(1, 2)

                linears = {
                    name: PoolLinear(*factors(name), read(f"{name}.gate"), read(f"{name}.absent"))
                    for name in json.loads(metadata["linears"])
                }
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise PhatgooseError(
                f"cannot open the pool {path} ({error}): delete it and save it again"
            ) from error
        return Pool(fingerprint, experts, linears)

    def index(self, expert: str) -> int:
        """Return the index of an expert; raise PhatgooseError if the pool does not have it."""
        return self.experts.index(known_expert(expert, self.experts))


def known_expert(expert: str, experts: Sequence[str]) -> str:
    """Return the name if it is one of these; raise PhatgooseError otherwise."""
    if expert not in experts:
        hint = f"{did_you_mean(expert, experts)} it has {', '.join(experts)}".strip()
        raise PhatgooseError(f"the pool has no expert {expert!r}: {hint}")
    return expert


def _stack(linear: str, experts: Sequence[Expert]) -> PoolLinear:
    present = {i: e.linears[linear] for i, e in enumerate(experts) if linear in e.linears}
    sizes = {(f.lora_A_RD.shape[1], f.lora_B_OR.shape[0]): i for i, f in present.items()}
    if len(sizes) > 1:
        names = [experts[i].card.name for i in sizes.values()]
        raise PhatgooseError(f"experts {names[0]!r} and {names[1]!r} differ in shape on {linear}")
    ((inputs, outputs),) = sizes
    rank = max(f.lora_A_RD.shape[0] for f in present.values())
    # Never narrower than float32: scaling in half precision would change what an expert adds.
    dtype = torch.float32
    for factors in present.values():
        dtype = torch.promote_types(dtype, factors.lora_A_RD.dtype)
    # Zeros pad lower ranks and absent experts: they add nothing to `B A x`.
    lora_A_ERD = torch.zeros(len(experts), inputs, rank, dtype=dtype).transpose(1, 2)
    lora_B_EOR = torch.zeros(len(experts), rank, outputs, dtype=dtype).transpose(1, 2)
    gate_ED: Tensor | None = torch.zeros(len(experts), inputs, dtype=dtype)
    absent_E = torch.ones(len(experts), dtype=torch.bool)
    for i, factors in present.items():
        own = factors.lora_A_RD.shape[0]
        lora_A_ERD[i, :own] = factors.lora_A_RD
        lora_B_EOR[i, :, :own] = factors.lora_B_OR.to(dtype) * experts[i].card.scale
        absent_E[i] = False
        if factors.gate_D is None:
            gate_ED = None
        elif gate_ED is not None:
            gate_ED[i] = factors.gate_D
    return PoolLinear(lora_A_ERD, lora_B_EOR, gate_ED, absent_E if absent_E.any() else None)
