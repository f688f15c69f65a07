"""The stage `train`: one job per expert, on reused actors. Each expert is published when done."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from harness import run_folder
from harness.registry.client import RegistryClient, answer_of, opened_access
from harness.registry.files import Record
from harness.scheduling.actor import Location
from harness.scheduling.progress import StageProgress
from harness.scheduling.workers import ATTEMPTS, TICK_SECONDS, Failure, Watch, Workers, last_line
from harness.source_code import PROFILES, TRAINING, code_of
from harness.storage import Folder
from harness.training.actor import Trained
from harness.training.checkpoints import FolderCheckpoints
from harness.training.job import TrainJob
from harness.training.job_table import JobTable
from phatgoose.errors import Diverged, OutOfMemory, PhatgooseError
from phatgoose.training.recipe import Recipe

_LOG = logging.getLogger(__name__)
# Write the manifest when the pool has grown by this share: about log N times for N experts.
_GROWTH = 0.1


class _LostExpertError(Exception):
    """A trained expert is gone, so its job has to run again."""


class Training(Watch):
    """The training of the experts of these jobs.

    A job's curve is written before its expert is published, so a finished job always has a curve.
    A job that fails is reported and does not stop the others.

    Args:
        jobs: the jobs, in the order in which to start them.
        folder: the run folder.
        workers: the training actors.
        registry_actor: the registry actor.
        table: the table of the run's jobs.
        progress: the progress of the stage, in tokens.
    """

    def __init__(
        self,
        jobs: Sequence[TrainJob],
        folder: Folder,
        workers: Workers,
        registry_actor: Any,
        table: JobTable,
        progress: StageProgress,
    ) -> None:
        self._folder, self._workers, self._registry_actor = folder, workers, registry_actor
        self._table, self._progress = table, progress
        # The actors have the same code, see `harness.scheduling.actor`.
        self._code, self._code_digest = code_of(TRAINING), ""
        self._client: RegistryClient | None = None
        self._jobs: dict[int, TrainJob] = {}  # by the key of the call
        self._given = list(jobs)
        self._recipes = {job.card.job: job.recipe for job in jobs}
        self._all_steps = {job.card.job: job.steps for job in jobs}
        self._steps: dict[str, int] = {}  # the most steps that each open job ever reached
        self._losses: dict[str, int] = {}  # how often a trained expert was lost, by name
        self._unnamed: list[str] = []  # jobs that no manifest names yet
        self._published = 0
        self._trained_tokens = progress.done  # by earlier calls
        self.experts: dict[str, str] = {}  # content hash by name, of the experts published here
        self.failures: dict[str, str] = {}  # the error, by expert

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Train all experts; return the errors of those that failed, by name.

        Args:
            meanwhile: called about every second, for other work.

        Raises:
            PhatgooseError: the registry or the run folder cannot be written to, so trained experts
                would be lost.
        """
        if any(job.profile_id for job in self._given):
            answer_of(self._registry_actor.put_code.remote(code_of(PROFILES)))
        self._code_digest = answer_of(self._registry_actor.put_code.remote(self._code))
        with opened_access(self._registry_actor) as self._client:
            for job in self._given:
                self._add(job)
            try:
                while not self._workers.is_done:
                    for key, result in self._workers.step(TICK_SECONDS):
                        self._take(self._jobs.pop(key), result)
                    self.show()
                    meanwhile()
            finally:
                self._name_all()
                self._table.save(now=True)
        return self.failures

    def started(self, key: int, location: Location) -> None:
        """Record that an actor has started a job."""
        self._table.start(self._jobs[key], location)

    def went_back(self, key: int, error: str, traceback: str) -> None:
        """Record that a job has to run again."""
        job = self._jobs[key]
        self._table.put_back(job, error, traceback)
        _LOG.warning("again     %s: %s", job.card.name, error)

    def revise(self, key: int, error: PhatgooseError) -> tuple[Any, ...] | None:
        """Return the job with a revised recipe, or None if it must fail, see `revised`."""
        job = self._jobs[key]
        recipe = revised(job.recipe, self._recipes[job.card.job], error)
        if recipe is None:
            return None
        # The card must say how the expert was really trained.
        ours = {k: v for k, v in recipe.identity().items() if k in job.card.recipe}
        card = replace(job.card, recipe={**job.card.recipe, **ours})
        self._jobs[key] = replace(job, card=card, recipe=recipe)
        return self._jobs[key], self._client

    def _add(self, job: TrainJob) -> None:
        (key,) = self._workers.add("train", [(job, self._client)], self)
        self._jobs[key] = job

    def _take(self, job: TrainJob, result: Any) -> None:
        """Publish the result of a job, or record that it failed."""
        name = job.card.name
        if isinstance(result, Failure):
            self._fail(job, result.error, result.traceback)
            return
        try:
            self._publish(job, result)
        except (RayError, _LostExpertError) as error:  # the actor died before it was published
            times = self._losses[name] = self._losses.get(name, 0) + 1
            if times < ATTEMPTS:
                self._table.put_back(job, f"not published: {last_line(error)}", "")
                self._add(job)
            else:
                self._fail(job, f"not published: {last_line(error)}", str(error))
            return
        if len(self._unnamed) >= max(1, math.ceil(_GROWTH * self._published)):
            self._name_all()
        FolderCheckpoints(self._folder, job.card.job).delete()
        self._ended(job)
        self._table.end(job)
        _LOG.info("trained   %s: %s", name, result.summary)

    def _ended(self, job: TrainJob) -> None:
        self._trained_tokens += self._table.tokens[job.card.job]
        self._steps.pop(job.card.job, None)

    def _fail(self, job: TrainJob, error: str, traceback: str) -> None:
        self._ended(job)
        self.failures[job.card.name] = error
        self._table.end(job, error, traceback)
        _LOG.warning("failed    %s: %s", job.card.name, error)

    def _publish(self, job: TrainJob, trained: Trained) -> None:
        """Write one job's curve, and publish its expert."""
        if trained.curve:
            self._folder.write(run_folder.training_file(job.card.name), trained.curve)
        if trained.content_hash is None:
            content_hash = self._publish_expert(job, trained)
        else:
            content_hash = self._record(job, trained.content_hash)
        if trained.profile is not None:
            try:
                put_profile = self._registry_actor.put_profile.remote
                answer_of(put_profile(content_hash, job.profile_id, trained.profile))
            except (RayError, PhatgooseError) as error:  # it is measured again before it is needed
                _LOG.warning("no profile of %s: %s", job.card.name, last_line(error))
        self.experts[job.card.name] = content_hash
        self._unnamed.append(job.card.job)
        self._published += 1

    def _record(self, job: TrainJob, content_hash: str) -> str:
        """Record the object that an actor has written; return the hash of the job's expert."""
        record = Record(content_hash, job.card.name, self._code_digest)
        valid: Record | None = answer_of(
            self._registry_actor.put_record.remote(job.card.job, record)
        )
        if valid is None:
            raise _LostExpertError("its object was deleted before it was recorded")
        return valid.object

    def _publish_expert(self, job: TrainJob, trained: Trained) -> str:
        """Publish the expert of an actor that does not see the registry's folder; return its hash.

        References are passed, so the expert goes from actor to actor, not through the driver.
        """
        try:
            publish = self._registry_actor.publish.remote
            content_hash: str = answer_of(
                publish(trained.expert, add_to_manifest=False, code=self._code)
            )
        except RayError:
            # The registry actor may have published the expert and died. When Ray then repeated the
            # call, the reference may have been lost.
            recorded: str | None = answer_of(self._registry_actor.recorded.remote(job.card.job))
            if recorded is None:
                raise
            return recorded
        return content_hash

    def _name_all(self) -> None:
        """Add the published experts to the registry's newest manifest.

        If this process dies before, the next call of the run adds them by their records.
        """
        if self._unnamed:
            answer_of(self._registry_actor.add_to_manifest.remote(self._unnamed))
            self._unnamed = []

    def show(self) -> None:
        """Report progress. A job that has to run again counts with the most steps it reached."""
        for key, steps in self._workers.under_way.items():
            job = self._jobs.get(key)
            if job is not None and steps > self._steps.get(job.card.job, 0):
                self._steps[job.card.job] = steps
        begun = sum(
            self._table.tokens[job] * steps // max(1, self._all_steps[job])
            for job, steps in self._steps.items()
        )
        counts, locations = self._table.counts(), self._workers.locations
        self._progress.update(self._trained_tokens + begun, counts, locations)
        self._table.save()


def revised(recipe: Recipe, first: Recipe, error: PhatgooseError) -> Recipe | None:
    """Return the recipe for another try after an error; None if another try is hopeless.

    OutOfMemory halves the micro-batch, and Diverged lowers the learning rate. Each happens at most
    once.

    Args:
        recipe: the recipe of the try that failed.
        first: the recipe of the first try.
        error: the error of the try that failed.
    """
    if isinstance(error, OutOfMemory) and recipe.micro_batch_size == first.micro_batch_size:
        return recipe.with_half_micro_batch()
    if isinstance(error, Diverged) and recipe.lora == first.lora and recipe.retry_lr > 0:
        return recipe.at_lower_rate()
    return None


def measure_profiles(
    jobs: Sequence[TrainJob],
    experts: Mapping[str, str],
    workers: Workers,
    registry_actor: Any,
    progress: StageProgress,
) -> dict[str, str]:
    """Measure the profiles of existing experts.

    Args:
        jobs: the jobs of these experts; each has a profile_id.
        experts: their content hashes by name.
        workers: the training actors.
        registry_actor: the registry actor.
        progress: the progress of the stage, in experts.

    Returns:
        The errors, by expert.
    """
    answer_of(registry_actor.put_code.remote(code_of(PROFILES)))
    failures: dict[str, str] = {}
    done = 0

    def show() -> None:
        counts = {
            "waiting": workers.waiting,
            "running": len(workers.under_way),
            "done": done - len(failures),
            "failed": len(failures),
        }
        progress.update(done, counts, workers.locations)

    with opened_access(registry_actor) as client:
        calls = [(job, experts[job.card.name], client) for job in jobs]
        for index, result in workers.run("profile", calls, show):
            job = jobs[index]
            if isinstance(result, Failure):
                failures[job.card.name] = result.error
            elif result is not None:  # the actor does not see the registry's folder
                content_hash = experts[job.card.name]
                answer_of(registry_actor.put_profile.remote(content_hash, job.profile_id, result))
            done += 1
    show()
    return failures
