"""The Ray cluster a run works on: the one that is running, or a local one while the run lasts."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

# Read when Ray starts: send nothing home; actors without a GPU must not see one.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")

import ray
from ray._private import ray_constants, services

from harness.config import ClusterConfig
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

_LOCAL_OBJECT_STORE = 512 * 2**20  # an expert at a time passes through it


class Cluster:
    """A connection to Ray, made when it is first needed and closed with the `with` block.

    It goes to the Ray that is running, or to one started for this purpose that only this machine
    can reach. A connection that the caller has made already is used and left open.
    """

    def __init__(self) -> None:
        self._ours = False

    def connect(self) -> None:
        """Connect, if that was not done yet."""
        if ray.is_initialized():
            return
        self._ours = True
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "phatgoose"}
        running = _running()
        if running:
            try:
                ray.init(address=running, **quiet)
            except ConnectionError as error:
                raise PhatgooseError(
                    f"the Ray at {running} does not answer: start it, or end what is left of it "
                    "with `ray stop` and unset RAY_ADDRESS to have a local one started"
                ) from error
        else:
            # Or Ray takes this machine's outer address for 127.0.0.1, and listens on all of them.
            ray_constants.ENABLE_RAY_CLUSTER = False
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=_LOCAL_OBJECT_STORE,
                _node_ip_address="127.0.0.1",
                **quiet,
            )

    def __enter__(self) -> "Cluster":
        """Connect later, when `connect` is called."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection, and end the Ray that was started for it."""
        if self._ours:
            ray.shutdown()


def _running() -> str | None:
    """The address of a Ray that is there to be shared: in RAY_ADDRESS, or of `ray start` here.

    `address="auto"` would also take the Ray that another run started for itself, and end with it.
    """
    address = os.environ.get("RAY_ADDRESS") or services.find_bootstrap_address(None)
    return None if address == "local" else address


def actor_options(config: ClusterConfig, labels: Mapping[str, str]) -> dict[str, Any]:
    """What an actor asks of Ray: cores, GPUs, and a node with these labels."""
    gpus = config.gpus_per_actor
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    options: dict[str, Any] = {"num_cpus": config.cpus_per_actor, "num_gpus": gpus}
    return {**options, "label_selector": dict(labels)} if labels else options


def actor_count(config: ClusterConfig, labels: Mapping[str, str]) -> int:
    """How many actors of this size the nodes with these labels have room for, at most `max_actors`.

    Raises:
        PhatgooseError: they have room for none.
    """
    asks = actor_options(config, labels)
    wanted = {"CPU": asks["num_cpus"], "GPU": asks["num_gpus"]}
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in alive if labels.items() <= (node.get("Labels") or {}).items()]
    if not nodes:
        raise PhatgooseError(
            f"none of the {len(alive)} nodes of the Ray cluster has the labels {dict(labels)}: "
            "start one with `ray start --labels`, or change cluster.train_nodes or evaluate_nodes"
        )
    # Node by node: an actor cannot take half its cores from each of two.
    count = min(
        sum(_room(node["Resources"], wanted) for node in nodes), config.max_actors or sys.maxsize
    )
    if count < 1:
        has = ray.cluster_resources()
        raise PhatgooseError(
            f"the Ray cluster has {has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU, and an "
            f"actor asks for {wanted['CPU']:g} and {wanted['GPU']:g}: lower cluster.cpus_per_actor "
            "or cluster.gpus_per_actor"
        )
    return count


def _room(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many actors that ask for `wanted` a node has room for."""
    room = [int(node.get(kind, 0) // amount) for kind, amount in wanted.items() if amount > 0]
    return min(room, default=0)


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
