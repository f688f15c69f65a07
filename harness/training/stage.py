"""The stage `train`: one job per expert on reused actors, published as each one ends."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from harness import run_folder
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
# The pool's manifest is written when it has grown by this part: of N experts, about log N times.
_GROWTH = 0.1


class Training(Watch):
    """Trains the experts of these jobs.

    The curve is written before the expert is published, so that a finished job always has one.
    A job that fails is reported and does not stop the others.

    Args:
        jobs: in the order in which to start them.
        folder: the run folder.
        workers: the training actors.
        registry_actor: the registry actor.
        table: the run's jobs.
        progress: of the stage, in tokens.
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
        self._code = code_of(TRAINING)  # the actors have the same, see `harness.scheduling.actor`
        self._jobs: dict[int, TrainJob] = {}  # by the key of the call
        self._given = list(jobs)
        self._recipes = {job.card.job: job.recipe for job in jobs}
        self._all_steps = {job.card.job: job.steps for job in jobs}
        self._steps: dict[str, int] = {}  # how far jobs that are not done ever were
        self._losses: dict[str, int] = {}  # experts that were trained and not published, by job
        self._unnamed: list[str] = []  # jobs that no manifest names yet
        self._published = 0
        self._trained_tokens = progress.done  # by earlier calls
        self.experts: dict[str, str] = {}  # content hash by name, of those published here
        self.failures: dict[str, str] = {}  # what went wrong, by expert

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Train them all; returns what went wrong, by expert.

        Args:
            meanwhile: called about every second, for work that need not wait.

        Raises:
            PhatgooseError: the registry or the run folder cannot be written to; going on would
                train experts that nothing keeps.
        """
        if any(job.profile_id for job in self._given):
            answer_of(self._registry_actor.put_code.remote(code_of(PROFILES)))
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
        """An actor has a job."""
        self._table.start(self._jobs[key], location)

    def went_back(self, key: int, error: str, traceback: str) -> None:
        """A job has to be done again."""
        job = self._jobs[key]
        self._table.put_back(job, error, traceback)
        _LOG.warning("again     %s: %s", job.card.name, error)

    def revise(self, key: int, error: PhatgooseError) -> tuple[Any, ...] | None:
        """Once, half a micro-batch where memory was short, a lower rate where a loss exploded."""
        job = self._jobs[key]
        recipe = revised(job.recipe, self._recipes[job.card.job], error)
        if recipe is None:
            return None
        # The card is to say how the expert was really trained.
        ours = {k: v for k, v in asdict(recipe).items() if k in job.card.recipe}
        card = replace(job.card, recipe={**job.card.recipe, **ours})
        self._jobs[key] = replace(job, card=card, recipe=recipe)
        return (self._jobs[key],)

    def _add(self, job: TrainJob) -> None:
        (key,) = self._workers.add("train", [(job,)], self)
        self._jobs[key] = job

    def _take(self, job: TrainJob, result: Any) -> None:
        """Publish what a job made, or note that it failed."""
        name = job.card.name
        if isinstance(result, Failure):
            self._fail(job, result.error, result.traceback)
            return
        try:
            said = self._publish(job, result)
        except RayError as error:  # the actor died before its expert was published
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
        _LOG.info("trained   %s: %s", name, said)

    def _ended(self, job: TrainJob) -> None:
        self._trained_tokens += self._table.tokens[job.card.job]
        self._steps.pop(job.card.job, None)

    def _fail(self, job: TrainJob, error: str, traceback: str) -> None:
        self._ended(job)
        self.failures[job.card.name] = error
        self._table.end(job, error, traceback)
        _LOG.warning("failed    %s: %s", job.card.name, error)

    def _publish(self, job: TrainJob, trained: Trained) -> str:
        """Keep one job's curve and expert; returns a line that says what was learnt."""
        if trained.curve:
            file = run_folder.training_file(job.card.name)
            run_folder.write_table(self._folder, file, run_folder.TRAINING, trained.curve)
        try:
            # References are passed on: experts go from actor to actor, not through the driver.
            publish = self._registry_actor.publish.remote
            content_hash = answer_of(
                publish(trained.expert, add_to_manifest=False, code=self._code)
            )
        except RayError:
            # The registry actor may have died after its work, and found the expert gone when Ray
            # repeated the call.
            recorded = answer_of(self._registry_actor.recorded.remote(job.card.job))
            if recorded is None:
                raise
            content_hash = recorded
        if trained.profile is not None:
            try:
                put_profile = self._registry_actor.put_profile.remote
                answer_of(put_profile(content_hash, job.profile_id, trained.profile))
            except (RayError, PhatgooseError) as error:  # it is measured again before it is needed
                _LOG.warning("no profile of %s: %s", job.card.name, last_line(error))
        self.experts[job.card.name] = content_hash
        self._unnamed.append(job.card.job)
        self._published += 1
        return _learnt(trained.curve)

    def _name_all(self) -> None:
        """Let the registry's newest manifest name what was published.

        Should this process die before, the next call of the run finds the records and does it.
        """
        if self._unnamed:
            answer_of(self._registry_actor.add_to_manifest.remote(self._unnamed))
            self._unnamed = []

    def show(self) -> None:
        """Write how far training is. A job that went back is as far as it ever was."""
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


def answer_of(reference: Any) -> Any:
    """What the registry actor answered; a PhatgooseError of its own is raised as it is."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PhatgooseError):
            raise error.cause from None
        raise


def revised(recipe: Recipe, first: Recipe, error: PhatgooseError) -> Recipe | None:
    """The recipe for one more try after an error; None if it was changed so before, or cannot be.

    Args:
        recipe: that of the try which failed.
        first: that of the first try.
        error: why it failed.
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
    """Measure the profiles of experts that were made before.

    Args:
        jobs: of these experts; each has a profile_id.
        experts: their content hashes by name.
        workers: the training actors.
        registry_actor: the registry actor.
        progress: of the stage, in experts.

    Returns:
        What went wrong, by expert.
    """
    answer_of(registry_actor.put_code.remote(code_of(PROFILES)))
    failures: dict[str, str] = {}
    calls = [(job, experts[job.card.name], registry_actor) for job in jobs]
    done = 0

    def show() -> None:
        counts = {
            "waiting": workers.waiting,
            "running": len(workers.under_way),
            "done": done - len(failures),
            "failed": len(failures),
        }
        progress.update(done, counts, workers.locations)

    for index, result in workers.run("profile", calls, show):
        job = jobs[index]
        if isinstance(result, Failure):
            failures[job.card.name] = result.error
        else:
            content_hash = experts[job.card.name]
            answer_of(registry_actor.put_profile.remote(content_hash, job.profile_id, result))
        done += 1
    show()
    return failures


def _learnt(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a training curve says in a few words."""
    if not rows:
        return "imported, without gates"
    losses = [f"{row['loss']:.2f}" for row in rows if row["split"] == "evaluation"]
    changes = [f"{losses[i]} -> {losses[i + 1]}" for i in range(0, len(losses), 2)]
    stages = dict.fromkeys(row["stage"] for row in rows)
    seconds = sum(max(row["seconds"] for row in rows if row["stage"] == s) for s in stages)
    said = [f"{stage} {change}" for stage, change in zip(stages, changes, strict=True)]
    return f"loss: {', '.join(said)}; {seconds:.0f} s"
