"""Delete files under a hidden name that their writers did not live to finish, or to delete.

They do no harm, as hidden files are never listed, but runs that are killed often would fill a disk.
The name says who writes, so that a file goes once its process is gone. Those of other machines
stay until `python -m harness.registry gc`.
"""

import contextlib
import os
import re
import shutil

from harness.storage.folder import Folder
from phatgoose.files import MACHINE

_NAME = re.compile(rf"\.{MACHINE}-(\d+)-[^.]+\.tmp")


def remove_left_over(folder: Folder) -> int:
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
