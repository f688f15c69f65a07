"""One of two processes that train one expert together, as an actor for tests."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from phatgoose.base import load_base
from phatgoose.expert import Expert
from tests.support import interrupted
from tests.support.tiny import state

# The summed gradients of two ranks differ from those of one in the last bit.
RECIPE = dataclasses.replace(interrupted.RECIPE, batch_size=8, clip=0.05)


class Rank:
    """One of two ranks, with a base of each family."""

    def __init__(self, rank: int, folders: dict[str, Path]) -> None:
        self.rank = rank
        self.bases = {name: load_base(str(folder)) for name, folder in folders.items()}

    def open_rendezvous(self) -> tuple[str, int]:
        from harness.training.rendezvous import open_rendezvous

        self.store = open_rendezvous(2)
        return self.store.host, self.store.port

    def join(self, host: str, port: int) -> None:
        from harness.training.engine import start_deepspeed
        from harness.training.rendezvous import join_rendezvous

        store = join_rendezvous(host, port, 2) if self.rank else self.store
        start_deepspeed(store, self.rank, 2)

    def train(self, family: str, zero_stage: int, at: int = 0, data: bytes = b"") -> Any:
        """Train to the end; or up to a number of forward passes, and return the checkpoint."""
        from harness.training.engine import DeepSpeedEngine

        base, memory = self.bases[family], interrupted.Memory()
        memory.data = data
        before = state(base)
        options: dict[str, Any] = {"checkpoints": memory}
        if at:
            options["heartbeat"] = interrupted.kill_at(at)
        engine = functools.partial(DeepSpeedEngine, zero_stage=zero_stage)
        try:
            expert, rows = interrupted.train(base, RECIPE, engine, **options)
        except interrupted.Killed:
            return memory.data
        assert all((before[name] == weight).all() for name, weight in state(base).items())
        return tensors(expert), rows


def tensors(expert: Expert) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": tensor
        for name, factors in expert.linears.items()
        for field, tensor in factors.tensors()
    }
