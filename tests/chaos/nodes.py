"""A Ray cluster of a head without work and three worker nodes, whose processes can be killed.

The cluster belongs to this process; the driver of the run is another process. All of it stays
on 127.0.0.1.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

WORKERS = 3
TRAINER, EVALUATOR, SCORER, REGISTRY = "TrainActor", "EvalActor", "ScoringActor", "Registry"
_COMMON = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
# A dead node is noticed within two seconds.
_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
_DEATH_SECONDS = 10.0
# Ray's agents survive for about a minute after their node is killed.
_END_SECONDS = 90.0


@dataclass(frozen=True)
class Actor:
    """The process of an actor: `kind` is its class, `method` is its current call, if any."""

    process: psutil.Process
    kind: str
    method: str
    node: str

    @property
    def works(self) -> bool:
        """Return whether the actor is in a call of the run and not starting."""
        return self.method not in ("", "__init__", "location", "heartbeat")


class Nodes:
    """The cluster during a `with` block, which must be entered in the main thread.

    Attributes:
        left: processes that are still alive after the block.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: socket paths are limited
        self.left: list[str] = []
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "Nodes":
        """Start head and workers."""
        os.environ["RAY_TMPDIR"] = str(self.folder)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args={**_COMMON, **head})
        for _ in range(WORKERS):
            self.add()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all nodes and record which of their processes do not end."""
        self.actors()  # list the processes before the nodes stop
        nodes, children = self._cluster.list_all_nodes(), _children()
        self._seen |= {process for node in nodes for process in _processes(node, children)}
        self._cluster.shutdown()
        deadline = time.monotonic() + _END_SECONDS
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.left = [f"{p.pid} {_title(p)}" for p in alive]
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Return the address under which a driver finds the cluster."""
        return str(self._cluster.address)

    @property
    def workers(self) -> list[Any]:
        """Return the worker nodes in a fixed order."""
        return sorted(self._cluster.worker_nodes, key=lambda node: _raylet(node))

    def add(self) -> str:
        """Add a worker node; return its id."""
        return str(self._cluster.add_node(num_cpus=1, **_COMMON).node_id)

    def actors(self) -> list[Actor]:
        """Return the actors of the run that are alive."""
        found, children = [], _children()
        for node in self._cluster.list_all_nodes():
            for process in _processes(node, children):
                self._seen.add(process)
                kind, _, method = _title(process).removeprefix("ray::").partition(".")
                if kind in (TRAINER, EVALUATOR, SCORER, REGISTRY):
                    found.append(Actor(process, kind, method, node.node_id))
        return found

    def kill_node(self, node: Any) -> int:
        """Kill a node's raylet and all processes it started; return how many were killed."""
        processes = _processes(node, _children())
        self._seen.update(processes)
        killed = sum([kill(process) for process in processes])
        self._cluster.remove_node(node, allow_graceful=False)
        return killed

    def _alive(self) -> list[psutil.Process]:
        mine = [p for p in psutil.process_iter() if str(self.folder) in _command(p)]
        return [p for p in {*self._seen, *mine} if is_alive(p)]


def kill(process: psutil.Process) -> bool:
    """Send SIGKILL; return whether the process was alive before and is dead now."""
    if not is_alive(process):
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    deadline = time.monotonic() + _DEATH_SECONDS
    while is_alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_in_cluster(address: str, seconds: float = 30.0) -> list[str]:
    """Return the live actors, names and placement groups that remain in a cluster.

    Wait up to the given time, because those of a driver that has just ended need a moment to go.
    """
    import ray

    from harness.scheduling.ray_internals import actor_states

    deadline = time.monotonic() + seconds
    with _connected(address):
        while True:
            states = actor_states()
            found = [f"actor {name}" for name, state in states.items() if state != "DEAD"]
            names = ray.util.list_named_actors(all_namespaces=True)
            found += [f"named actor {name}" for name in names]
            groups = ray.util.placement_group_table().values()
            found += [f"placement group {g['name']}" for g in groups if g["state"] != "REMOVED"]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _raylet(node: Any) -> int:
    (found,) = node.all_processes["raylet"]
    return int(found.process.pid)


def _children() -> dict[int, list[psutil.Process]]:
    """Return all processes of this machine by parent, so that one scan answers many queries."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process)
    return children


def _processes(node: Any, children: dict[int, list[psutil.Process]]) -> list[psutil.Process]:
    """Return a node's raylet and all processes it started."""
    # A copy, because another thread may be ending the node.
    own = [i.process.pid for infos in list(node.all_processes.values()) for i in infos]
    found = []
    for pid in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
            started = list(children.get(pid, ()))
            while started:
                found.append(started.pop())
                started += children.get(found[-1].pid, ())
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _title(process: psutil.Process) -> str:
    """Return Ray's title of a worker: `ray::Class.method`."""
    return _command(process).split(" ")[0].removesuffix("()")
