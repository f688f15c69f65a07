"""The progress of a run: `status.json` in the run folder, a terminal bar, and Ray's metrics."""

import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import ray
from ray.util import metrics
from tqdm import tqdm

from harness import run_folder
from harness.scheduling.actor import Location
from harness.storage import Folder

_LOG = logging.getLogger(__name__)
_WRITE_SECONDS = 2.0
_STATES = ("waiting", "running", "done", "failed")
_CLOCK_JUMP = 60.0  # seconds between the two clocks that are worth a warning


class StageProgress:
    """The progress of one stage, while its `with` block lasts.

    Args:
        folder: the run folder.
        stage: `train`, `profile` or `evaluate`.
        total: the amount of work, in `unit`s.
        unit: the unit of work: `token`, `expert` or `request`.
        jobs: the number of jobs.
        done: the amount that was done before this call.
    """

    def __init__(
        self, folder: Folder, stage: str, total: int, unit: str, jobs: int, done: int = 0
    ) -> None:
        self._folder, self._stage, self._unit, self._jobs = folder, stage, unit, jobs
        self._total, self._done, self._before = total, done, done
        self._counts = dict.fromkeys(_STATES, 0) | {"waiting": jobs}
        self._locations: Sequence[tuple[Location, bool]] = ()
        self._started = time.monotonic()
        self._clock = time.time() - time.monotonic()
        self._written = -float("inf")
        self._finished_jobs = 0
        self._metrics: dict[str, Any] = {}
        self._bar = tqdm(
            total=total, initial=done, desc=stage, unit=unit, unit_scale=True, disable=None
        )

    def __enter__(self) -> "StageProgress":
        """Write that the stage has begun."""
        self._write(now=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        """Write how the stage ended."""
        self._bar.close()
        self._locations = ()
        self._write(now=True, ended="stopped" if kind else "finished")

    @property
    def done(self) -> int:
        """The amount done, including earlier calls."""
        return self._done

    def update(
        self, done: int, counts: dict[str, int], locations: Sequence[tuple[Location, bool]]
    ) -> None:
        """Update the amount done, the jobs by state, and the actors and whether they work."""
        self._finished_jobs += max(0, counts["done"] - self._counts["done"])
        self._done, self._counts, self._locations = done, dict(counts), locations
        if not self._bar.disable:
            self._bar.n = done
            self._bar.refresh()
        self._write()

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def _rate(self) -> float:
        """Units per second, in this call."""
        return (self._done - self._before) / max(self._seconds, 1e-9)

    def _write(self, *, now: bool = False, ended: str | None = None) -> None:
        if not now and time.monotonic() - self._written < _WRITE_SECONDS:
            return
        self._written = time.monotonic()
        self._look_at_the_clock()
        run_folder.write_json(self._folder, run_folder.STATUS_FILE, self._status(ended))
        if ray.is_initialized():
            self._tell_ray()

    def _look_at_the_clock(self) -> None:
        """Warn if the system clock jumped: nothing depends on it except times in files."""
        clock = time.time() - time.monotonic()
        if abs(clock - self._clock) > _CLOCK_JUMP:
            _LOG.warning(
                "the clock of %s jumped by %+.0f s. The run continues, and times written from now "
                "on are those of the new clock.",
                socket.gethostname(),
                clock - self._clock,
            )
            self._clock = clock

    def _status(self, ended: str | None) -> dict[str, Any]:
        rate = self._rate
        return {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "driver": {"host": socket.gethostname(), "process": os.getpid()},
            "stage": self._stage,
            "state": ended or "running",
            "unit": self._unit,
            "done": self._done,
            "total": self._total,
            "rate": round(rate, 3),
            "seconds": round(self._seconds, 1),
            "seconds_left": round((self._total - self._done) / rate) if rate > 0 else None,
            "jobs": {"total": self._jobs, **self._counts},
            "jobs_per_hour": round(3600 * self._finished_jobs / max(self._seconds, 1e-9), 1),
            "actors": [
                {"node": p.node, "address": p.address, "process": p.process, "works": works}
                for p, works in self._locations
            ],
        }

    def _tell_ray(self) -> None:
        """Report metrics to Ray. Its dashboard and Prometheus show them as `ray_phatgoose_*`."""
        per_hour = 3600 * self._finished_jobs / max(self._seconds, 1e-9)
        for name, value, text in (
            ("queue_length", self._counts["waiting"], "jobs or chunks that wait for an actor"),
            ("jobs_done", self._counts["done"], "jobs or chunks done"),
            ("jobs_failed", self._counts["failed"], "jobs that failed"),
            ("jobs_per_hour", per_hour, "experts, profiles or chunks done per hour, in this call"),
            (f"{self._unit}s_per_second", self._rate, f"{self._unit}s per second, in this call"),
            ("actors", len(self._locations), "actors that have started"),
        ):
            gauge = self._metrics.get(name)
            if gauge is None:
                gauge = metrics.Gauge(f"phatgoose_{name}", text, tag_keys=("stage",))
                self._metrics[name] = gauge
            gauge.set(value, tags={"stage": self._stage})
