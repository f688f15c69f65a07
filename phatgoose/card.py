"""The parts of an expert: the LoRA factors of each adapted linear, and a card on their origin.

Shape suffixes: D input features of a linear, O its output features, R LoRA rank.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def validate_name(name: str) -> str:
    """Return `name` if it can name an expert (and so a file); raise PhatgooseError if not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise PhatgooseError(
            f"{name!r} cannot name an expert: use at most 100 letters, digits, '.', '_' and '-', "
            "a letter or digit first"
        )
    return name


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """What an expert adds to one linear: `y = W x + scale * B A x`, and the gate that routes to it.

    A field whose default is None is optional, also in the file.
    """

    lora_A_RD: Tensor
    lora_B_OR: Tensor
    gate_D: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the tensor of each field that is set."""
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                yield field.name, tensor


@dataclass(frozen=True)
class Card:
    """The origin of an expert.

    `recipe` and `metrics` become what JSON makes of them, so that a card equals itself after it
    was stored (tuples turn into lists). Raises PhatgooseError if JSON has no form for them.
    """

    name: str
    task: str
    base: str
    base_fingerprint: str
    data_fingerprint: str
    job: str
    scale: float
    recipe: dict[str, Any]
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        """Bring the fields into the form they have after storing."""
        object.__setattr__(self, "scale", float(self.scale))
        for name in ("scale", "recipe", "metrics"):
            try:
                value = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise PhatgooseError(
                    f"the card of expert {self.name!r} cannot be stored, its {name} is not JSON "
                    f"({error}): use finite numbers, strings, lists and dictionaries"
                ) from error
            object.__setattr__(self, name, value)

    def to_json(self) -> str:
        """Return the card as canonical JSON (sorted keys, one line)."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)


def check_factors(where: str, factors: LoraFactors) -> None:
    """Raise PhatgooseError, which begins with `where`, unless shapes, dtypes and values fit."""
    A, B, gate = factors.lora_A_RD, factors.lora_B_OR, factors.gate_D
    agree = A.ndim == 2 and B.ndim == 2 and A.shape[0] == B.shape[1] and A.numel() and B.numel()
    if not agree or (gate is not None and gate.shape != A.shape[1:]):
        shapes = ", ".join(f"{field} {list(tensor.shape)}" for field, tensor in factors.tensors())
        raise PhatgooseError(f"{where}: the shapes {shapes} do not fit [R, D], [O, R] and [D]")
    for field, tensor in factors.tensors():
        if dtype_name(tensor.dtype) not in DTYPES:
            raise PhatgooseError(
                f"{where}: {field} is {dtype_name(tensor.dtype)}: convert it to one of "
                f"{list(DTYPES)}"
            )
        if not torch.isfinite(tensor).all():
            raise PhatgooseError(
                f"{where}: {field} holds NaN or infinity: train it again with a lower rate"
            )


def content_hash(card: Card, linears: Mapping[str, LoraFactors]) -> str:
    """Return the SHA-256, in hexadecimal, over the card and every tensor's name, dtype and bits.

    It depends neither on the order of the linears nor on how a file lays them out.
    """
    digest = hashlib.sha256(card.to_json().encode() + b"\n")
    for linear in sorted(linears):
        for field, tensor in linears[linear].tensors():
            # One line says how many bytes follow, so no two experts read the same.
            head = [linear, field, dtype_name(tensor.dtype), list(tensor.shape)]
            digest.update(json.dumps(head).encode() + b"\n")
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def with_job(card: Card, linears: Mapping[str, LoraFactors]) -> Card:
    """Return the card of an imported expert, whose job is a hash of its content.

    The hash covers name, fingerprints, scale and factors. What the base is called and how the
    expert was made do not count, so the same import from another place is the same job.
    """
    anonymous = dataclasses.replace(card, base="", job="", recipe={}, metrics={})
    return dataclasses.replace(card, job=content_hash(anonymous, linears)[:32])


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, without a copy where possible."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
