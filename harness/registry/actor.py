"""The registry as a Ray actor: it keeps the records and manifests of a run."""

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.registry import Registry

RegistryActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Registry)


def registry_actor(uri: str | Path, base_fingerprint: str) -> Any:
    """Return an actor over `Registry(uri, base_fingerprint)` with the registry's methods.

    Ray restarts it and repeats interrupted calls, which every method allows. It ends with the last
    of its handles. Raises what Registry raises.
    """
    # Opened here, so that an error is raised here, not in an actor.
    folder = Registry(uri, base_fingerprint).folder
    # A local folder belongs to this node: an actor elsewhere would write to another disk.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    place = {"scheduling_strategy": here} if folder.local("objects") else {}
    return RegistryActor.options(**place).remote(folder.uri, base_fingerprint)
