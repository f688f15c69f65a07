"""The one exception for mistakes that a user can fix, and the parts of its messages."""

import difflib
import errno
import os
from collections.abc import Iterable, Sequence

# What an operating system may refuse, and the fix.
FIXES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to, with hard links",
    errno.EOPNOTSUPP: "choose a folder whose filesystem has hard links",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter folder",
}


class PhatgooseError(Exception):
    """An error the user can fix. The message says in one line what failed, where, and the fix."""

    def __init__(self, message: str) -> None:
        # What a message quotes, such as the name of a column, may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


class Diverged(PhatgooseError):
    """A loss that is not finite, or that exploded."""


class OutOfMemory(PhatgooseError):
    """Less memory than the work needs."""


def reason_of(error: BaseException, *, first_line: bool = False) -> str:
    """Return what an error says in one line of at most 300 characters, to be quoted in another.

    Args:
        error: what was raised, by a library or the operating system.
        first_line: leave out the lines after the first one, where a library adds a dump.
    """
    if isinstance(error, PhatgooseError):
        return str(error)
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        # Without the number and the path, which the message names itself.
        text = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    if first_line:
        text = text.strip().partition("\n")[0]
    return " ".join(text.split())[:300] or type(error).__name__


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first `most` names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def near_names(wanted: str, names: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Return up to three of `names` that `wanted` may have meant, the nearest first.

    Without a near one, names that contain `wanted` are returned.
    """
    names = list(dict.fromkeys(names))
    near: Sequence[str] = difflib.get_close_matches(wanted, names, cutoff=cutoff)
    return list(near or [name for name in names if wanted and wanted in name][:3])


def did_you_mean(wanted: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `did you mean a or b?` with the near names; empty if there are none."""
    near = near_names(wanted, names, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else ""


def check_known(name: object, names: Iterable[str], problem: str) -> None:
    """Raise PhatgooseError, with the problem and similar names, unless `name` is in `names`."""
    names = list(names)
    if name not in names:
        available = f"available: {', '.join(names) or 'none'}"
        raise PhatgooseError(
            f"{problem}; {did_you_mean(str(name), names, cutoff=0.5) or available}"
        )


def refusal(error: OSError) -> str | None:
    """Return one line for what the operating system refused; None for any other OSError."""
    fix = FIXES.get(error.errno or 0)
    if fix is None:
        return None
    if error.filename:
        return f"cannot use {error.filename} ({reason_of(error)}): {fix}"
    return (
        f"a file cannot be written ({reason_of(error)}): {fix} (temporary files are in TMPDIR, "
        "prepared data in PHATGOOSE_CACHE)"
    )
