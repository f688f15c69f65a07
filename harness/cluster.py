"""The Ray cluster a run works on: the one that is running, or a local one while the run lasts."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Read when Ray starts: send nothing home; actors without a GPU must not see one.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray

from harness.config import ClusterConfig
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

_LOCAL_OBJECT_STORE = 512 * 2**20  # an expert at a time passes through it


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to a running Ray, or start one that only this machine can reach.

    A connection that the caller has made already is used and left open.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "phatgoose"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def actor_count(config: ClusterConfig) -> int:
    """How many actors of this size the cluster has room for, at most `max_actors`.

    Raises:
        PhatgooseError: it has room for none.
    """
    available = ray.cluster_resources()
    wanted = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    room = [int(available.get(kind, 0) // amount) for kind, amount in wanted.items() if amount > 0]
    count = min([*room, config.max_actors or sys.maxsize])
    if count < 1 or not room:
        has = ", ".join(f"{available.get(kind, 0):g} {kind}" for kind in wanted)
        raise PhatgooseError(
            f"the Ray cluster ({has}) has no room for an actor of {config.cpus_per_actor:g} CPU "
            f"and {config.gpus_per_actor:g} GPU: lower cluster.cpus_per_actor or gpus_per_actor"
        )
    return count


def actor_options(config: ClusterConfig) -> dict[str, float]:
    """What an actor asks of Ray."""
    return {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}


def log_to_run_folder(run_dir: str, name: str) -> None:
    """Send all that this actor's process prints to a file of its own in the run folder.

    On a run folder that is not a local path, Ray's own log files keep it.
    """
    path = Folder(run_dir).local(f"logs/{name}-{os.getpid()}.log")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
