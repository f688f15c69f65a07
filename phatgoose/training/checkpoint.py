"""The state of a training job, in one safetensors file: enough to resume it bit by bit.

Tensors are stored as the file's tensors, everything else as JSON in its metadata. A state is
complete whatever the number of ranks that saved it, so any number of ranks may resume from it.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

from phatgoose.card import raw_bytes
from phatgoose.errors import PhatgooseError, reason_of
from phatgoose.files import safetensors_metadata
from phatgoose.training.curve import CurveRow
from phatgoose.training.recipe import Recipe


@dataclass
class State:
    """The state of a job. The order of its examples follows from the recipe and the steps done.

    Attributes:
        stage: the current one, `lora` or `gates`.
        step: optimizer steps done in this stage.
        tokens: tokens read in this stage.
        seconds: time spent in this stage.
        curve: the rows of the training curve so far, of all stages.
        metrics: of the stages before this one.
        weights: what is trained in this stage; empty before the first step.
        optimizer: the optimizer state of each weight, by name.
        best_loss: the lowest validation loss of this stage, if any was measured.
        best: the weights at that time.
        factors: the finished factors, in stage `gates`.
        random: the states of torch's generators, `cpu` and perhaps `cuda`.
    """

    stage: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[CurveRow] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    optimizer: list[dict[str, Tensor]] = field(default_factory=list)
    best_loss: float | None = None
    best: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)

    def to_bytes(self, owner: str) -> bytes:
        """Return the bytes of the file; `owner` identifies the job."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        plain["curve"] = [dataclasses.astuple(row) for row in self.curve]
        text = json.dumps({"owner": owner, **plain})
        tensors = dict(self._tensors())
        metadata = {"state": text, "sha256": _digest(text, tensors)}
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, owner: str) -> "State":
        """Read a file's bytes; raise PhatgooseError if it is damaged or has another owner."""
        try:
            metadata = safetensors_metadata(data)
            tensors = safetensors.torch.load(data)
            plain = json.loads(metadata["state"])
            whole = metadata["sha256"] == _digest(metadata["state"], tensors)
        # What a damaged file may raise: of JSON, of Unicode, of safetensors' own.
        except Exception as error:
            reason = reason_of(error)
            raise PhatgooseError(f"it is damaged ({type(error).__name__}: {reason})") from None
        if not whole:
            raise PhatgooseError("it is damaged (its SHA-256 is another)")
        if plain.pop("owner") != owner:
            raise PhatgooseError("it is from another job, recipe or version of the code")
        curve = [CurveRow(*row) for row in plain.pop("curve")]
        return cls(**plain, curve=curve, **_groups(tensors))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Return every tensor by its name in the file: `group.index` or `optimizer.index.name`."""
        named = [(f"random.{name}", tensor) for name, tensor in self.random.items()]
        for group in _LISTS:
            named += [(f"{group}.{i}", tensor) for i, tensor in enumerate(getattr(self, group))]
        for i, remembered in enumerate(self.optimizer):
            named += [(f"optimizer.{i}.{name}", tensor) for name, tensor in remembered.items()]
        return [(name, tensor.detach().cpu().contiguous()) for name, tensor in named]


_PLAIN = ("stage", "step", "tokens", "seconds", "metrics", "best_loss")
_LISTS = ("weights", "best", "factors")


class Checkpoints(Protocol):
    """The storage of a job's state; each rank of a job has its own."""

    def load(self) -> State | None:
        """Return the newest usable state, or None."""

    def due(self) -> bool:
        """Return whether the newest state is old enough to be replaced."""

    def save(self, state: State) -> None:
        """Save a state in place of the previous one."""


class NoCheckpoints:
    """Checkpoints that save nothing."""

    def load(self) -> State | None:
        """Return None."""
        return None

    def due(self) -> bool:
        """Return False."""
        return False

    def save(self, state: State) -> None:
        """Do nothing."""


def owner_of(job: str, recipe: Recipe) -> str:
    """Return what identifies a job's states: its id and its recipe, with the learning rates.

    The micro-batch size is left out: losses depend on it by rounding only.
    """
    values = recipe.identity()
    del values["micro_batch_size"]
    return f"{job} {hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}"


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that training on this device may draw from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore the generators' states."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _groups(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the fields of a State that are tensors."""
    indexed: dict[str, dict[int, Any]] = {group: {} for group in (*_LISTS, "optimizer")}
    random: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        group, key, *rest = name.split(".")
        if group == "random":
            random[key] = tensor
        elif group == "optimizer":
            indexed[group].setdefault(int(key), {})[rest[0]] = tensor
        else:
            indexed[group][int(key)] = tensor
    lists = {group: [found[i] for i in sorted(found)] for group, found in indexed.items()}
    return {**lists, "random": random}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
