"""The table of a run's jobs, one row per expert to make, stored in `jobs.parquet`.

A job is done once the registry has a record of it. The table reports what happened to the other
jobs, and where, for `python -m harness.status` and for anyone who investigates a failure later.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from harness import run_folder
from harness.scheduling.actor import Location
from harness.storage import Folder
from harness.training.job import TrainJob

_SAVE_SECONDS = 2.0


class JobTable:
    """The jobs of one call of a run.

    Args:
        folder: the run folder.
        jobs: all jobs of the run.
        tokens: by job id, the number of tokens that the job trains on.
        finished: the ids of jobs that were done before.
    """

    def __init__(
        self,
        folder: Folder,
        jobs: Sequence[TrainJob],
        tokens: Mapping[str, int],
        finished: Mapping[str, str],
    ) -> None:
        self._folder, self.tokens = folder, tokens
        self._started: dict[str, float] = {}
        self._saved = -float("inf")
        before = self._before()
        self._rows: dict[str, dict[str, Any]] = {
            job.card.job: {
                "expert": job.card.name,
                "job": job.card.job,
                "state": "done" if job.card.job in finished else "waiting",
                "tokens": tokens[job.card.job],
                "steps": job.steps,
                "starts": 0,
                **dict.fromkeys(("node", "address", "process", "seconds", "traceback")),
                "micro_batch_size": job.recipe.micro_batch_size,
                "lr": job.recipe.lora.lr,
                "errors": [],
            }
            for job in jobs
        }
        for job, row in self._rows.items():
            if row["state"] == "done" and job in before:
                row |= before[job] | {"state": "done"}  # keep the row of that call

    def start(self, job: TrainJob, location: Location) -> None:
        """Record that an actor has started the job."""
        row = self._rows[job.card.job]
        row |= {
            "state": "running",
            "starts": row["starts"] + 1,
            "node": location.node,
            "address": location.address,
            "process": location.process,
        }
        self._started[job.card.job] = time.monotonic()
        self.save()

    def put_back(self, job: TrainJob, error: str, traceback: str) -> None:
        """Record that the job has to run again, perhaps with another recipe."""
        row = self._rows[job.card.job]
        row |= {
            "state": "waiting",
            "micro_batch_size": job.recipe.micro_batch_size,
            "lr": job.recipe.lora.lr,
            "errors": [*row["errors"], error],
            "traceback": traceback or row["traceback"],
        }
        self.save()

    def end(self, job: TrainJob, error: str | None = None, traceback: str = "") -> None:
        """Record that the job is done, or that it failed with an error."""
        row = self._rows[job.card.job]
        row["seconds"] = self._seconds(job.card.job)
        self._started.pop(job.card.job, None)
        row["state"] = "done" if error is None else "failed"
        if error is not None:
            row["errors"] = [*row["errors"], error]
            row["traceback"] = traceback or row["traceback"]
        self.save()

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each state."""
        states = Counter(row["state"] for row in self._rows.values())
        return {state: states[state] for state in ("waiting", "running", "done", "failed")}

    def save(self, *, now: bool = False) -> None:
        """Write the table; unless `now`, skip it if the last write is recent."""
        if not now and time.monotonic() - self._saved < _SAVE_SECONDS:
            return
        for job in self._started:
            self._rows[job]["seconds"] = self._seconds(job)
        rows = list(self._rows.values())
        run_folder.write_table(self._folder, run_folder.JOBS_FILE, run_folder.JOBS, rows)
        self._saved = time.monotonic()

    def _seconds(self, job: str) -> float | None:
        started = self._started.get(job)
        return None if started is None else round(time.monotonic() - started, 3)

    def _before(self) -> dict[str, dict[str, Any]]:
        """Return the rows of an earlier call, by job id."""
        if not self._folder.exists(run_folder.JOBS_FILE):
            return {}
        table = run_folder.read_table(self._folder, run_folder.JOBS_FILE, run_folder.JOBS)
        return {row["job"]: row for row in table.to_pylist()}
