"""Everything that this project uses beyond the public interface of Ray, with the reasons.

No other module imports `ray._private`, so only this one has to be checked when Ray changes.
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

    Otherwise, Ray replaces 127.0.0.1 by this machine's external address, and listens there too. The
    environment variable for this (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) is not enough: Ray reads it at
    import, and a later connection to a real cluster needs the external address again.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def local_ray(num_cpus: int, object_store_memory: int, **options: Any) -> Iterator[None]:
    """Start a Ray that only this machine can reach, and stop it at the end of the block.

    Args:
        num_cpus: the number of its cores.
        object_store_memory: the size of its object store, in bytes.
        options: other options of `ray.init`.
    """
    with loopback_only():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_memory,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",  # Ray has no public option for this
            **options,
        )
        try:
            yield
        finally:
            ray.shutdown()


def started_address() -> str | None:
    """Return the address of the Ray that `ray start` started on this machine; None without one.

    The public `address="auto"` would also find a Ray that another run started for itself, and that
    ends with that run.
    """
    address: str | None = services.find_bootstrap_address(None)
    return address


def available_resources_by_node() -> dict[str, dict[str, float]]:
    """Return the free resources of each node, by its id.

    The public `ray.available_resources` returns the sum over all nodes.
    """
    available: dict[str, dict[str, float]] = ray_state.available_resources_per_node()
    return available


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that are about to leave, such as spot machines being reclaimed.

    Ray has no public function for this.
    """
    return frozenset(ray_state.state.get_draining_nodes())


def actor_states() -> dict[str, str]:
    """Return the state of each actor of the cluster, also of dead ones, by its class and id.

    The public `ray.util.state.list_actors` asks the dashboard, and the local Ray has none.
    """
    return {f"{a['ActorClassName']} {key}": a["State"] for key, a in ray_state.actors().items()}
