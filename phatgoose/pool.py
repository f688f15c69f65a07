"""A pool: the experts of one base, stacked per linear, as routed inference reads them.

Shape suffixes: E experts, R LoRA rank (the largest of the pool), D input and O output features.

Factors lie in memory as mixing reads them fastest, see `phatgoose.ops.packed`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phatgoose.errors import PhatgooseError, did_you_mean
from phatgoose.expert import Expert
from phatgoose.files import TensorLayout, write_safetensors
from phatgoose.ops import packed
from phatgoose.profile import Profile

# The names of a pool's dtypes in its file.
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


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
        fingerprint, names = _common(experts)
        linears = {linear: _stack(linear, experts) for linear in _adapted(experts)}
        return Pool(fingerprint, names, linears)

    @staticmethod
    def write(
        experts: Sequence[Expert], folder: str | Path, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Write the pool of these experts as `save` does, with one linear in memory at a time.

        Args:
            experts: in the pool's order; those that were loaded from files take no memory.
            folder: where to write it.
            beat: called before each linear, as a heartbeat.

        Raises:
            PhatgooseError: see `from_experts`.
        """

        def stacks() -> Iterator[tuple[str, PoolLinear]]:
            for linear in sizes:
                beat()
                yield linear, _stack(linear, experts)

        fingerprint, names = _common(experts)
        sizes = {linear: _sizes(linear, experts) for linear in _adapted(experts)}
        _write(Path(folder), fingerprint, names, sizes, stacks())

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
        sizes = {name: _Sizes.of(linear) for name, linear in self.linears.items()}
        _write(Path(folder), self.base_fingerprint, self.experts, sizes, self.linears.items())

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


def _common(experts: Sequence[Expert]) -> tuple[str, tuple[str, ...]]:
    """Return the experts' base and their names; raise PhatgooseError if they cannot be a pool."""
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
    return first.card.base_fingerprint, tuple(names)


def _adapted(experts: Sequence[Expert]) -> list[str]:
    """Return every linear that any expert adapts."""
    return list(dict.fromkeys(linear for expert in experts for linear in expert.linears))


@dataclass(frozen=True)
class _Sizes:
    """The sizes of all experts' factors on one linear, and what else there is."""

    experts: int
    rank: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    has_gates: bool
    has_absent: bool

    @staticmethod
    def of(linear: PoolLinear) -> "_Sizes":
        experts, rank, inputs = linear.lora_A_ERD.shape
        return _Sizes(
            experts,
            rank,
            inputs,
            outputs=linear.lora_B_EOR.shape[1],
            dtype=linear.lora_A_ERD.dtype,
            has_gates=linear.gate_ED is not None,
            has_absent=linear.absent_E is not None,
        )

    def layouts(self, linear: str) -> dict[str, TensorLayout]:
        """Return the layouts of its tensors in the pool's file."""
        dtype = _DTYPES[self.dtype]
        found = {
            f"{linear}.lora_A_EDR": TensorLayout(dtype, (self.experts, self.inputs, self.rank)),
            f"{linear}.lora_B_ERO": TensorLayout(dtype, (self.experts, self.rank, self.outputs)),
        }
        if self.has_gates:
            found[f"{linear}.gate"] = TensorLayout(dtype, (self.experts, self.inputs))
        if self.has_absent:
            found[f"{linear}.absent"] = TensorLayout("BOOL", (self.experts,))
        return found


def _sizes(linear: str, experts: Sequence[Expert]) -> _Sizes:
    """Return the sizes of the stack; raise PhatgooseError if the experts' shapes differ."""
    present = {i: e.linears[linear] for i, e in enumerate(experts) if linear in e.linears}
    shapes = {(f.lora_A_RD.shape[1], f.lora_B_OR.shape[0]): i for i, f in present.items()}
    if len(shapes) > 1:
        names = [experts[i].card.name for i in shapes.values()]
        raise PhatgooseError(f"experts {names[0]!r} and {names[1]!r} differ in shape on {linear}")
    ((inputs, outputs),) = shapes
    # Never narrower than float32: scaling in half precision would change what an expert adds.
    dtype = torch.float32
    for factors in present.values():
        dtype = torch.promote_types(dtype, factors.lora_A_RD.dtype)
    return _Sizes(
        len(experts),
        max(f.lora_A_RD.shape[0] for f in present.values()),
        inputs,
        outputs,
        dtype,
        has_gates=all(f.gate_D is not None for f in present.values()),
        has_absent=len(present) < len(experts),
    )


def _stack(linear: str, experts: Sequence[Expert]) -> PoolLinear:
    """Stack the experts' factors; zeros pad lower ranks and absent experts: they add nothing."""
    sizes = _sizes(linear, experts)
    count, dtype = sizes.experts, sizes.dtype
    lora_A_ERD = torch.zeros(count, sizes.inputs, sizes.rank, dtype=dtype).transpose(1, 2)
    lora_B_EOR = torch.zeros(count, sizes.rank, sizes.outputs, dtype=dtype).transpose(1, 2)
    gate_ED = torch.zeros(count, sizes.inputs, dtype=dtype) if sizes.has_gates else None
    absent_E = torch.ones(count, dtype=torch.bool)
    for i, expert in enumerate(experts):
        factors = expert.linears.get(linear)
        if factors is None:
            continue
        own = factors.lora_A_RD.shape[0]
        lora_A_ERD[i, :own] = factors.lora_A_RD
        lora_B_EOR[i, :, :own] = factors.lora_B_OR.to(dtype) * expert.card.scale
        absent_E[i] = False
        if gate_ED is not None and factors.gate_D is not None:
            gate_ED[i] = factors.gate_D
    return PoolLinear(lora_A_ERD, lora_B_EOR, gate_ED, absent_E if sizes.has_absent else None)


def _write(
    folder: Path,
    fingerprint: str,
    experts: Sequence[str],
    sizes: Mapping[str, _Sizes],
    linears: Iterable[tuple[str, PoolLinear]],
) -> None:
    """Write the file of a pool, which `Pool.open` maps."""
    layouts: dict[str, TensorLayout] = {}
    for name, size in sizes.items():
        layouts |= size.layouts(name)
    metadata = {
        "base_fingerprint": fingerprint,
        "experts": json.dumps(experts),
        "linears": json.dumps(list(sizes)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pool.safetensors"
    write_safetensors(path, metadata, layouts, _data(linears))
    path.chmod(0o644)  # others may map it too


def _data(linears: Iterable[tuple[str, PoolLinear]]) -> Iterator[tuple[str, memoryview]]:
    """Yield the bytes of each tensor, without a copy if factors lie as the file has them."""
    for name, linear in linears:
        tensors = {
            "lora_A_EDR": linear.lora_A_ERD.transpose(1, 2),
            "lora_B_ERO": linear.lora_B_EOR.transpose(1, 2),
            "gate": linear.gate_ED,
            "absent": linear.absent_E,
        }
        for key, tensor in tensors.items():
            if tensor is not None:
                raw = tensor.contiguous().view(torch.uint8).flatten()
                yield f"{name}.{key}", raw.numpy().data
                del raw
        del linear, tensors, tensor  # before the next is stacked
