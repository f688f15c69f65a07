"""What every actor of the harness answers: where it is, and how far."""

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ray

import phatgoose
from harness.storage import Folder
from phatgoose.errors import PhatgooseError


@dataclass(frozen=True)
class Location:
    """Where an actor is: its node's id and address, and its process."""

    node: str
    address: str
    process: int

    def __str__(self) -> str:
        """Short enough for a table."""
        return f"{self.address} ({self.node[:6]}), process {self.process}"


@dataclass(frozen=True)
class Heartbeat:
    """How far an actor is: a count that grows with all it does, and the steps of its call."""

    count: int
    steps: int


class Actor:
    """The base class of the harness's actors.

    Args:
        code: what `code_version` said in the driver's process.

    Raises:
        PhatgooseError: this node has other code than the driver.
    """

    def __init__(self, code: str) -> None:
        if code_version() != code:
            raise PhatgooseError(
                f"the code on node {ray.util.get_node_ip_address()} is {code_version()}, the "
                f"driver's is {code}: install the same version of phatgoose on every node; if a "
                "file was edited since the run began, start the same command again"
            )
        self._done = 0  # grows with all that is done
        self._steps = 0  # of the call under way

    def location(self) -> Location:
        """Where this actor is."""
        context = ray.get_runtime_context()
        return Location(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())

    def heartbeat(self) -> Heartbeat:
        """Return how far this actor is."""
        return Heartbeat(self._done, self._steps)


def log_to_run_folder(run_dir: str, name: str) -> None:
    """Send the messages of this actor's process to a file of its own in the run folder.

    The file also takes standard output and error, by their descriptors: compilers, NCCL, gloo and a
    crashing interpreter write there without going through Python. On a run folder that is not a
    local path, Ray's own log files keep both.
    """
    path = Folder(run_dir).local(f"logs/{name}-{os.getpid()}.log")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for package in ("harness", "phatgoose"):
        logging.getLogger(package).addHandler(handler)
        logging.getLogger(package).setLevel(logging.INFO)


@cache
def code_version() -> str:
    """A hash over the source files of both packages, as this process has them on its disk."""
    digest = hashlib.sha256()
    for package in (Path(phatgoose.__file__).parent, Path(__file__).parents[1]):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{file.relative_to(package)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
