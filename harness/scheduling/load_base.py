"""Load the base on an actor, with the threads, device and dtype that results depend on."""

from typing import TYPE_CHECKING

import ray
import torch

from phatgoose.base import Base, load_base
from phatgoose.errors import PhatgooseError

if TYPE_CHECKING:
    from harness.scheduling.settings import BaseConfig


def load_base_on_actor(
    config: "BaseConfig", fingerprint: str, *, on_host: bool = False, mps: bool = False
) -> Base:
    """Load the base on the device that Ray assigned to this actor, and check that it is the plan's.

    Args:
        config: the base to load.
        fingerprint: the fingerprint of the plan's base.
        on_host: keep the base in the memory of the host.
        mps: use the GPU of a Mac. Ray does not assign it.

    Raises:
        PhatgooseError: the base's files on this node are not those that the plan was made with.
    """
    cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cores)))
    device = "cuda" if ray.get_gpu_ids() else "mps" if mps else "cpu"
    base = load_base(
        config.name,
        dtype=config.dtype,
        device="cpu" if on_host else device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if base.fingerprint != fingerprint:
        raise PhatgooseError(
            f"base.name={config.name}: the base on this node is {base.fingerprint[:12]}, and the "
            f"plan was made with {fingerprint[:12]}. Put the same files on every node."
        )
    return base
