"""Settings of actors: their sizes, the nodes they may run on, and the base they load."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class BaseConfig:
    """The base to load, as arguments of `phatgoose.load_base`."""

    name: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False


@dataclass
class ClusterConfig:
    """The sizes and limits of actors, and the labels of the nodes that they may run on."""

    cpus_per_actor: float = 1
    gpus_per_actor: float | None = None
    max_actors: int | None = None
    lease_seconds: float = 900
    wait_seconds: float = 60
    checkpoint_seconds: float = 60
    train_nodes: dict[str, str] = field(default_factory=dict)
    evaluate_nodes: dict[str, str] = field(default_factory=dict)

    @property
    def patience(self) -> dict[str, Any]:
        """How long `harness.scheduling.workers.Workers` waits for progress and for nodes."""
        return {"lease_seconds": self.lease_seconds, "wait_seconds": self.wait_seconds}
