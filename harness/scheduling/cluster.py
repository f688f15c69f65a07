"""The Ray cluster of a run: one that is running already, or a local one that ends with the run."""

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

# Read when Ray starts: send no usage statistics, and hide GPUs from actors without one.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
# A submitted job and `Cluster` may pass the same variable on, with the same value. Allow that.
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
# Read when an actor imports torch: compute on the CPU what `mps` does not support.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import ray
from ray.autoscaler.sdk import request_resources

from harness.scheduling.hardware import own_device, usable_cores
from harness.scheduling.ray_internals import (
    available_resources_by_node,
    draining_nodes,
    local_ray,
    started_address,
)
from harness.scheduling.settings import ClusterConfig
from phatgoose.errors import PhatgooseError, reason_of

_MOST_REQUESTED = 1000  # actors per request to the autoscaler
_LOCAL_OBJECT_STORE = 512 * 2**20  # experts pass through it one at a time
# The driver's values of these apply on every node. Tokens and keys are not passed on.
_PASSED_ON = (
    "PHATGOOSE_CACHE",
    "PHATGOOSE_LINEAR",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
)


class Cluster:
    """A connection to Ray, opened when it is first needed and closed with the `with` block.

    It connects to a running Ray, or starts one that only this machine can reach. An existing
    connection of the caller is used and left open.
    """

    def __init__(self) -> None:
        self._connection = contextlib.ExitStack()

    def connect(self) -> None:
        """Connect, unless there is a connection already."""
        if ray.is_initialized():
            return
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "phatgoose"}
        running = _running()
        if running:
            try:
                passed_on = {k: os.environ[k] for k in _PASSED_ON if k in os.environ}
                ray.init(address=running, runtime_env={"env_vars": passed_on}, **quiet)
            except ConnectionError as error:
                raise PhatgooseError(
                    f"the Ray at {running} does not answer. Start it. Or stop what is left of it "
                    "with `ray stop` and unset RAY_ADDRESS, so that the run starts a local one."
                ) from error
            self._connection.callback(ray.shutdown)
        else:
            try:
                self._connection.enter_context(
                    local_ray(usable_cores(), _LOCAL_OBJECT_STORE, **quiet)
                )
            except OSError as error:
                raise _cannot_start(error) from error

    def device(self, config: ClusterConfig) -> str:
        """Return the kind of device that actors get: `cpu`, `cuda`, or `mps` on a Mac.

        Without `cluster.gpus_per_actor`, this depends on the GPUs of the running cluster, or of
        this machine if the run starts its own Ray. Ray does not know `mps`, so only a run that
        starts its own Ray uses it.
        """
        if config.gpus_per_actor is not None:
            return "cuda" if config.gpus_per_actor > 0 else "cpu"
        if not ray.is_initialized() and not _running():
            return own_device()
        self.connect()
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"

    def __enter__(self) -> "Cluster":
        """Return the cluster without connecting; call `connect` for that."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection, and stop the Ray that was started for it."""
        self._connection.close()


def _cannot_start(error: OSError) -> PhatgooseError:
    """Return the error for a local Ray that cannot use its temporary folder."""
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    where = f"{variable}={os.environ.get(variable, tempfile.gettempdir())}"
    reason = reason_of(error)
    if "AF_UNIX" in reason:
        return PhatgooseError(
            f"{where}: the name is too long for Ray's sockets, whose paths have at most 107 "
            "characters. Set RAY_TMPDIR to a short folder, such as RAY_TMPDIR=/tmp."
        )
    return PhatgooseError(
        f"{where}: Ray cannot be started there ({reason}). Set RAY_TMPDIR to a folder with space "
        "that you may write to."
    )


def _running() -> str | None:
    """Return the address of a Ray to share: RAY_ADDRESS, or that of `ray start` on this machine."""
    address = os.environ.get("RAY_ADDRESS") or started_address()
    return None if address == "local" else address


def actor_options(
    config: ClusterConfig, labels: Mapping[str, str], gpus: float | None = None
) -> dict[str, Any]:
    """Return the Ray options of an actor: cores, GPUs, and the labels of its nodes.

    Args:
        config: the sizes of actors.
        labels: the labels of the nodes that it may run on.
        gpus: the number of GPUs, if it is not that of `config`.
    """
    gpus = config.gpus_per_actor if gpus is None else gpus
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    options: dict[str, Any] = {"num_cpus": config.cpus_per_actor, "num_gpus": gpus}
    return {**options, "label_selector": dict(labels)} if labels else options


def room(
    options: Mapping[str, Any], most: int | None = None, *, free: bool = False, ranks: int = 1
) -> int:
    """Return the number of actors with these options that the remaining nodes have room for.

    Nodes that are about to leave do not count.

    Args:
        options: see `actor_options`.
        most: the maximum to return.
        free: count only resources that are free now.
        ranks: count groups of this many actors. A group may span several nodes.
    """
    labels = options.get("label_selector", {})
    available = available_resources_by_node() if free else {}
    leaving = draining_nodes()
    count = 0
    for node in ray.nodes():
        fits = labels.items() <= (node.get("Labels") or {}).items()
        if node["Alive"] and fits and node["NodeID"] not in leaving:
            has = available.get(node["NodeID"], {}) if free else node["Resources"]
            # Count node by node: an actor cannot take half its cores from each of two.
            count += _fit(has, options)
    return min(count // ranks, most or sys.maxsize)


def request_nodes(options: Mapping[str, Any], count: int) -> None:
    """Ask Ray's autoscaler, if there is one, for room for `count` actors; 0 ends the request.

    The request is necessary because the autoscaler starts nodes for pending actors only, and this
    project starts actors only where there is room.
    """
    asks = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    bundles = [{k: v for k, v in asks.items() if v > 0}] * min(count, _MOST_REQUESTED)
    labels = [dict(options.get("label_selector", {}))] * len(bundles)
    request_resources(bundles=bundles, bundle_label_selectors=labels)


def check_room(
    config: ClusterConfig,
    labels: Mapping[str, str],
    ranks: int = 1,
    gpus: float | None = None,
) -> None:
    """Check that there is room for an actor; wait for it unless the Ray is this run's own.

    Raises:
        PhatgooseError: there is no room. The message gives the available and requested resources.
    """
    options = actor_options(config, labels, gpus)
    ends = time.monotonic() + (0 if _is_own() else config.wait_seconds)
    if not room(options, ranks=ranks):
        request_nodes(options, ranks)
    while not room(options, ranks=ranks):
        if time.monotonic() < ends:
            time.sleep(1)
            continue
        request_nodes(options, 0)
        alive = [node for node in ray.nodes() if node["Alive"]]
        if not any(labels.items() <= (node.get("Labels") or {}).items() for node in alive):
            raise PhatgooseError(
                f"none of the {len(alive)} nodes of the Ray cluster has the labels {dict(labels)}. "
                "Start one with `ray start --labels`, or change cluster.train_nodes or "
                "cluster.evaluate_nodes."
            )
        has = ray.cluster_resources()
        asked = f"{ranks} actors ask for" if ranks > 1 else "an actor asks for"
        raise PhatgooseError(
            f"the Ray cluster has {has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU, and "
            f"{asked} {options['num_cpus']:g} and {options['num_gpus']:g}"
            f"{' each' if ranks > 1 else ''}. Lower cluster.cpus_per_actor, cluster.gpus_per_actor "
            "or train.gpus_per_expert."
        )


def _is_own() -> bool:
    """Return whether the Ray is a local one that ends with the run, so no node can join it."""
    return not _running()


def _fit(has: Mapping[str, float], options: Mapping[str, Any]) -> int:
    """Return the number of actors with these options that fit the resources of a node."""
    asks = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    return min(
        (int(has.get(k, 0) // amount) for k, amount in asks.items() if amount > 0), default=0
    )
