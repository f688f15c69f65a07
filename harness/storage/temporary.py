"""Hidden names of files that are being written; a name says which process writes."""

import hashlib
import os
import re
import socket
import uuid
from pathlib import Path

# What every temporary name is like, on any machine.
TEMPORARY = re.compile(r"\.[A-Za-z0-9]+-\d+-[0-9a-f]{32}\.tmp")


def _machine() -> str:
    """What only the processes that see each other's numbers have in common.

    Two machines may have one name, and so may two containers that number their processes apart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        boot, numbers = socket.gethostname(), ""
    return hashlib.sha256(f"{boot}{numbers}".encode()).hexdigest()[:16]


MACHINE = _machine()


def temporary_name() -> str:
    """A new hidden name for a file or folder that this process is about to finish."""
    return f".{MACHINE}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
