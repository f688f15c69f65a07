"""Delete hidden temporary files whose writers died before they finished.

These files are harmless, since hidden files are never listed, but runs that are often killed would
fill the disk. The name contains the machine and the process, so a file is deleted once its process
is gone. Files of other machines stay until `python -m harness.registry gc`.
"""

import contextlib
import os
import re
import shutil

from harness.storage.folder import Folder
from phatgoose.files import MACHINE

_NAME = re.compile(rf"\.{MACHINE}-(\d+)-[^.]+\.tmp")


def remove_left_over(folder: Folder) -> int:
    """Delete what dead processes of this machine left below a folder; return the number deleted.

    Nothing is left on an object store: an unfinished object has no name there.
    """
    inside = folder.local("objects")
    if inside is None:
        return 0
    count = 0
    for path in list(inside.parent.rglob(f".{MACHINE}-*.tmp")):
        match = _NAME.fullmatch(path.name)
        if not match or _is_alive(int(match[1])):
            continue
        with contextlib.suppress(OSError):  # another process may delete it too
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
    except OSError:  # the process of another user
        pass
    return True
