"""Observe a run from outside, by its files and the logs of its actors.

A separate thread observes, so that times are right whatever else this process is doing.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.nodes import Actor, Nodes

_LOOK_SECONDS = 0.1
_LINE = re.compile(r".* harness\.training\.actor: (training|trained) (\S+?)(?: \(job .*\)|:.*)")


@dataclass(frozen=True)
class Line:
    """A message of a training actor: it is `training` an expert, or has `trained` it."""

    seconds: float
    process: int
    what: str
    expert: str


class Watch:
    """An observer of a run folder, active from its creation until `close`.

    Attributes:
        records: when the registry's record of each expert was first seen, by name.
        progress: when the last new record or answer was seen.
        lines: messages of training actors with their times.
        actors: those alive at the last look.
        status: status.json, {} before it exists.
        regressions: where reported progress decreased within a stage of one driver.
        look_out: called after each look.
    """

    def __init__(self, run_dir: Path, nodes: Nodes) -> None:
        self._run_dir, self._nodes = run_dir, nodes
        self._start = time.monotonic()
        self.records: dict[str, float] = {}
        self.progress = 0.0
        self.lines: list[Line] = []
        self.actors: list[Actor] = []
        self.status: dict[str, Any] = {}
        self.regressions: list[str] = []
        self.look_out: Callable[[], None] = lambda: None
        self._read: dict[Path, int] = {}  # how much of each log has been read
        self._known: set[Path] = set()
        self._answered: set[Path] = set()
        self._is_open = True
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def answers(self) -> int:
        """Return how many shards were answered."""
        return len(self._answered)

    @property
    def seconds(self) -> float:
        """Return the time since the observer was made."""
        return time.monotonic() - self._start

    def close(self) -> None:
        """Look a last time, and stop.

        Raises:
            Exception: the error that occurred while looking.
        """
        self._is_open = False
        self._thread.join()
        if self.error is not None:
            raise self.error

    def trains(self, process: int) -> Line | None:
        """Return the message that an actor is training an expert, if that was its last one."""
        said = [line for line in self.lines if line.process == process]
        return said[-1] if said and said[-1].what == "training" else None

    def _run(self) -> None:
        try:
            while self._is_open:
                self._look()
                time.sleep(_LOOK_SECONDS)
            self._look()
        except BaseException as error:
            self.error = error

    def _look(self) -> None:
        for log in sorted(self._run_dir.glob("logs/train-*.log")):
            self._read_log(log)
        new = set(self._run_dir.glob("registry/jobs/[0-9a-f]*.json")) - self._known
        for file in sorted(new):
            self.records[json.loads(file.read_text())["name"]] = self.seconds
        self._known |= new
        # A shard's file disappears when its router is scored.
        answered = set(self._run_dir.glob("answers/shards/[0-9a-f]*.parquet")) - self._answered
        self._answered |= answered
        if new or answered:
            self.progress = self.seconds
        status = self._run_dir / "status.json"
        if status.exists():
            self._take_status(json.loads(status.read_text()))
        self.actors = self._nodes.actors()
        self.look_out()

    def _take_status(self, status: dict[str, Any]) -> None:
        before, self.status = self.status, status
        same = [status[k] == before.get(k) for k in ("driver", "stage", "total")]
        if all(same) and status["done"] < before["done"] and before["state"] == "running":
            self.regressions.append(
                f"status.json, {status['stage']}: from {before['done']} back to {status['done']} "
                f"{status['unit']}s"
            )

    def _read_log(self, log: Path) -> None:
        with log.open("rb") as file:
            file.seek(self._read.get(log, 0))
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read[log] = self._read.get(log, 0) + len(whole) + len(newline)
        process = int(log.stem.partition("-")[2])
        for text in whole.decode(errors="replace").splitlines():
            if match := _LINE.fullmatch(text):
                self.lines.append(Line(self.seconds, process, match[1], match[2]))


def working(actors: list[Actor], kind: str | None = None) -> list[Actor]:
    """Return the actors that are in a call, in a fixed order; `kind` selects a class."""
    found = [a for a in actors if a.works and kind in (None, a.kind)]
    return sorted(found, key=lambda actor: actor.process.pid)
