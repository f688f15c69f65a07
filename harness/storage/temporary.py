"""Files under a hidden name that their writers did not live to finish, or to delete.

They do no harm, as hidden files are never listed, but runs that are killed often would fill a disk.
The name says who writes, so that a file goes once its process is gone. Those of other machines
stay until `python -m harness.registry gc`.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.storage import Folder

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
_NAME = re.compile(rf"\.{MACHINE}-(\d+)-[^.]+\.tmp")


def temporary_name() -> str:
    """A new hidden name for a file or folder that this process is about to finish."""
    return f".{MACHINE}-{os.getpid()}-{uuid.uuid4().hex}.tmp"


def remove_left_over(folder: "Folder") -> int:
    """Delete what dead processes of this machine left below a folder; returns how much that was.

    On an object store nothing is left: there, what is not finished has no name.
    """
    inside = folder.local("objects")
    if inside is None:
        return 0
    count = 0
    for path in list(inside.parent.rglob(f".{MACHINE}-*.tmp")):
        match = _NAME.fullmatch(path.name)
        if not match or _is_alive(int(match[1])):
            continue
        with contextlib.suppress(OSError):  # another process may do the same
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            count += 1
    return count


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
