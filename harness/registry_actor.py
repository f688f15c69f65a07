"""The registry as a Ray actor: one writer for all the actors of a run, wherever they are."""

import hashlib
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.registry import Registry

RegistryActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Registry)


def registry_actor(uri: str | Path, base_fingerprint: str) -> Any:
    """This Ray job's actor over `Registry(uri, base_fingerprint)`; its methods are the registry's.

    Ray restarts it and repeats calls that were under way, which every method allows. Each Ray job
    has its own, because an actor ends with the driver that made it. Raises what Registry raises.
    """
    folder = Registry(uri, base_fingerprint).folder  # a mistake shows here, not in an actor
    absolute = folder.uri
    # A local folder is this node's: an actor elsewhere would write to another disk.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    place = {"scheduling_strategy": here} if folder.local("objects") else {}
    job = ray.get_runtime_context().get_job_id()
    key = hashlib.sha256(f"{absolute}\n{base_fingerprint}\n{job}".encode()).hexdigest()[:16]
    return RegistryActor.options(
        name=f"registry-{key}", namespace="phatgoose", get_if_exists=True, **place
    ).remote(absolute, base_fingerprint)
