"""Allow one driver per run folder, with a lease that expires unless its holder renews it.

    driver/<n>.json   the holder of the run folder; the highest number counts

A driver takes over by creating the next number. Only one of several processes can do that, see
`Folder.create`. A holder that was suspended and wakes up finds a higher number, and ends.

Clocks of two machines are never compared. If the holder is on another machine, a new driver watches
whether the holder's file changes. If it is on the same machine, the driver looks up its process.
"""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import psutil

from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.files import MACHINE

_RENEW_SECONDS = 4.0
_EXPIRE_SECONDS = 20.0
_LOOK_SECONDS = 0.5


class RunLease:
    """The right to write to a run folder. Entering the block checks it; `take` acquires it.

    Args:
        folder: the run folder.
        renew_seconds: the interval at which the lease is renewed.
        expire_seconds: how long another machine's lease may stay unchanged before it is taken over.
    """

    def __init__(
        self,
        folder: Folder,
        renew_seconds: float = _RENEW_SECONDS,
        expire_seconds: float = _EXPIRE_SECONDS,
    ) -> None:
        self._folder, self._renew, self._expire = folder, renew_seconds, expire_seconds
        self._number = 0  # of the lease that is held
        self._expired: dict[str, Any] | None = None  # another machine's lease that expired
        self._lost_to: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._signal = signal.SIGINT  # interrupts the main thread
        self._handler: Any = None  # the signal's handler before
        self._me = {
            "machine": MACHINE,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }

    def __enter__(self) -> "RunLease":
        """Check that no other driver holds the folder."""
        self._wait_until_free()
        return self

    def take(self) -> None:
        """Take the lease, and renew it from now on.

        Raises:
            PhatgooseError: another driver holds the folder.
        """
        while True:
            number = self._wait_until_free() + 1
            if self._create(number):
                break
        self._number = number
        for older in self._numbers():
            if older < number:
                self._folder.delete(_file(older), missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            # A process that a script starts in the background ignores SIGINT.
            self._signal = signal.SIGUSR1
            self._handler = signal.signal(self._signal, _interrupt)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Give the lease back.

        Raises:
            PhatgooseError: the lease was lost in the meantime.
        """
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._handler is not None:
            signal.signal(self._signal, self._handler)
        if self._lost_to is not None:
            raise PhatgooseError(
                f"run.dir={self._folder}: {_describe(self._lost_to)} took over, because this one "
                f"showed no sign of life for {self._expire:.0f} s. Follow the other one with "
                "`python -m harness.status`."
            ) from error
        if self._number:
            with contextlib.suppress(PhatgooseError):  # if this fails, the lease expires
                holder = self._read(self._number) or {}
                if holder.get("token") == self._me["token"]:
                    self._folder.delete(_file(self._number), missing_ok=True)

    def _keep(self) -> None:
        """Renew the lease until the block ends; interrupt the main thread if it was lost."""
        renewed = 0
        while not self._ended.wait(self._renew):
            try:
                # Numbers restart after a lease was given back, so the number alone is not enough.
                holder = self._read(max(self._numbers(), default=self._number)) or {}
                if holder.get("token") != self._me["token"]:
                    self._lost_to = holder
                    main = threading.main_thread().ident
                    if main is not None:  # like Ctrl-C, so that a wait ends, too
                        signal.pthread_kill(main, self._signal)
                    return
                renewed += 1
                self._folder.write(_file(self._number), self._content(renewed))
            except PhatgooseError:
                continue  # the disk may be full for a while; the next renewal may work

    def _wait_until_free(self) -> int:
        """Wait until no lease is valid; return the number of the newest one, or 0."""
        seen: dict[str, Any] | None = None
        since = time.monotonic()
        while True:
            number = max(self._numbers(), default=0)
            holder = self._read(number) if number else None
            if holder is None or holder == self._expired or _is_dead_here(holder):
                return number
            changed = seen is not None and holder != seen
            if changed or _is_here(holder):
                raise PhatgooseError(
                    f"run.dir={self._folder}: {_describe(holder)} is using it. Wait until it ends, "
                    "or choose another run.dir."
                )
            if time.monotonic() - since >= self._expire:
                self._expired = holder
                return number
            seen = holder
            time.sleep(_LOOK_SECONDS)

    def _create(self, number: int) -> bool:
        try:
            return self._folder.create(_file(number), self._content(0))
        except PhatgooseError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            # This filesystem has no exclusive creation. A plain file is better than no lease.
            self._folder.write(_file(number), self._content(0))
            return True

    def _content(self, renewed: int) -> bytes:
        return json.dumps({**self._me, "renewed": renewed}).encode()

    def _numbers(self) -> list[int]:
        matches = (re.fullmatch(r"driver/(\d+)\.json", n) for n in self._folder.names("driver/"))
        return [int(match[1]) for match in matches if match]

    def _read(self, number: int) -> dict[str, Any] | None:
        """Return a lease; None if it was given back in the meantime."""
        data = self._folder.find(_file(number))
        if data is None:
            return None
        try:
            content: dict[str, Any] = dict(json.loads(data))
        except (TypeError, ValueError):
            content = {"damaged": data.hex()}  # it is taken over if it does not change
        return content


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _file(number: int) -> str:
    return f"driver/{number}.json"


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == MACHINE


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that has ended.

    Another process may have its id by now.
    """
    if not _is_here(holder):
        return False
    try:
        process = psutil.Process(int(holder["process"]))
        is_same = abs(process.create_time() - float(holder["process_started"])) < 1.0
        return not is_same or process.status() == psutil.STATUS_ZOMBIE
    except (LookupError, TypeError, ValueError, psutil.NoSuchProcess):
        return True
    except psutil.AccessDenied:
        return False


def _describe(holder: dict[str, Any]) -> str:
    host, process = holder.get("host", "an unknown host"), holder.get("process", "?")
    return f"another driver (process {process} on {host}, since {holder.get('since', '?')})"
