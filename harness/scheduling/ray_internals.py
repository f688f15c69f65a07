"""Everything that this project uses of Ray beyond its public interface, with the reason for each.

Nothing else imports `ray._private`, so a new version of Ray is checked here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private import state as ray_state


@contextlib.contextmanager
def loopback_only() -> Iterator[None]:
    """Let a Ray that is started inside the block use 127.0.0.1 only.

    Otherwise, Ray replaces 127.0.0.1 by this machine's outer address, and listens there too. Ray
    reads the environment variable for this (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) at its import, and
    a later connection to a real cluster needs the outer address again.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def local_ray(num_cpus: int, object_store_memory: int, **options: Any) -> Iterator[None]:
    """Start a Ray that only this machine can reach, and end it with the block.

    Args:
        num_cpus: its cores.
        object_store_memory: the size of its object store, in bytes.
        options: others of `ray.init`.
    """
    with loopback_only():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_memory,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",  # there is no public name for it
            **options,
        )
        try:
            yield
        finally:
            ray.shutdown()


def started_address() -> str | None:
    """Return the address of the Ray that `ray start` started on this machine, if there is one.

    The public `address="auto"` would also take the Ray that another run started for itself, and
    end with it.
    """
    address: str | None = services.find_bootstrap_address(None)
    return address


def available_resources_by_node() -> dict[str, dict[str, float]]:
    """Return what no actor or task holds on each node, by its id.

    The public `ray.available_resources` gives the sum over all nodes.
    """
    available: dict[str, dict[str, float]] = ray_state.available_resources_per_node()
    return available


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that are about to leave, such as spot machines called back.

    Ray has no public name for this.
    """
    return frozenset(ray_state.state.get_draining_nodes())


def actor_states() -> dict[str, str]:
    """Return the state of each actor of the cluster, dead ones too, by its class and id.

    The public `ray.util.state.list_actors` asks the dashboard, which a local Ray has not.
    """
    return {f"{a['ActorClassName']} {key}": a["State"] for key, a in ray_state.actors().items()}
