"""The base class of all actors of the harness: location, heartbeat, log and code version."""

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ray

import phatgoose
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.files import MACHINE

# Between two copies of a log to a bucket.
_COPY_SECONDS = 10.0


class Refused(PhatgooseError):
    """An error that every call with the same arguments would raise, on any actor."""


@dataclass(frozen=True)
class Location:
    """The location of an actor: its node's id and address, and its process."""

    node: str
    address: str
    process: int

    def __str__(self) -> str:
        """Return a text that is short enough for a table."""
        return f"{self.address} ({self.node[:6]}), process {self.process}"


@dataclass(frozen=True)
class Heartbeat:
    """The progress of an actor: a count that grows with all its work, and the steps of its call."""

    count: int
    steps: int


class Actor:
    """The base class of the harness's actors.

    Args:
        code: the driver's `code_version`.

    Raises:
        PhatgooseError: this node's code differs from the driver's.
    """

    def __init__(self, code: str) -> None:
        if code_version() != code:
            raise PhatgooseError(
                f"the code on node {ray.util.get_node_ip_address()} is {code_version()}, and the "
                f"driver's is {code}. Install the same version of phatgoose on every node. If a "
                "file was edited during the run, run the same command again."
            )
        self._done = 0  # grows with all work
        self._steps = 0  # of the current call

    def location(self) -> Location:
        """Return the location of this actor."""
        context = ray.get_runtime_context()
        return Location(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())

    def heartbeat(self) -> Heartbeat:
        """Return the progress of this actor."""
        return Heartbeat(self._done, self._steps)

    def _beat(self) -> None:
        """Record progress, because long work must not look like a hang."""
        self._done += 1


def log_to_run_folder(run_dir: str, name: str) -> None:
    """Send the log messages of this actor's process to a file of its own in the run folder.

    Standard output and error go to the same file, by their descriptors, because compilers, NCCL,
    gloo and a crashing interpreter write there without Python. If the run folder is a bucket, the
    file is a temporary one that is copied there while it grows.
    """
    folder = Folder(run_dir)
    path = folder.local(f"logs/{name}-{os.getpid()}.log")
    copies = path is None
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="phatgoose-logs-")) / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if copies:
        target = f"logs/{name}-{MACHINE[:6]}-{os.getpid()}.log"
        threading.Thread(target=_copy_log, args=(path, folder, target), daemon=True).start()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for package in ("harness", "phatgoose"):
        logging.getLogger(package).addHandler(handler)
        logging.getLogger(package).setLevel(logging.INFO)


def _copy_log(path: Path, folder: Folder, name: str) -> None:
    """Copy a file to a bucket whenever it has grown, until the process ends."""
    size = 0
    while True:
        time.sleep(_COPY_SECONDS)
        data = path.read_bytes()
        if len(data) > size:
            with contextlib.suppress(PhatgooseError):  # the next copy has it all
                folder.write(name, data)
                size = len(data)


@cache
def code_version() -> str:
    """Return a hash of the source files of both packages on this process's disk."""
    digest = hashlib.sha256()
    for package in (Path(phatgoose.__file__).parent, Path(__file__).parents[1]):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{file.relative_to(package)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
