"""The stage `train`: one job per expert on reused actors, published as each one ends."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from harness import results
from harness.jobs import ATTEMPTS, Failure, Workers, last_line
from harness.storage import Folder
from harness.train_actor import TrainJob
from phatgoose.errors import PhatgooseError


def train(
    jobs: Sequence[TrainJob], folder: Folder, workers: Workers, keeper: Any
) -> dict[str, str]:
    """Train the experts of these jobs.

    The curve is written before the expert is published, so that a finished job always has one.
    A job that fails is reported and does not stop the others.

    Args:
        jobs: in the order in which to start them.
        folder: the run folder.
        workers: the training actors.
        keeper: the registry's actor.

    Returns:
        What went wrong, by expert.

    Raises:
        PhatgooseError: the registry or the run folder cannot be written to; going on would train
            experts that nothing keeps.
    """

    def publish(job: TrainJob, result: tuple[Any, ...]) -> str | _Lost:
        return _publish(folder, keeper, job, result)

    failures: dict[str, str] = {}
    waiting = list(range(len(jobs)))
    recipe_steps = [job.steps for job in jobs]
    done_steps = 0
    with tqdm(total=sum(recipe_steps), desc="train", unit="step", disable=None) as bar:

        def tick(actors: list[Any]) -> None:
            if not bar.disable:
                bar.n = done_steps + _steps_under_way(actors)
                bar.refresh()

        for attempt in range(1, ATTEMPTS + 1):
            lost = []
            for place, result in workers.run("train", [(jobs[i],) for i in waiting], tick):
                index = waiting[place]
                name = jobs[index].card.name
                outcome = result if isinstance(result, Failure) else publish(jobs[index], result)
                if isinstance(outcome, _Lost) and attempt < ATTEMPTS:
                    lost.append(index)
                    continue
                done_steps += recipe_steps[index]
                if isinstance(outcome, str):
                    tqdm.write(f"trained   {name}: {outcome}", file=sys.stderr)
                else:
                    failures[name] = outcome.error
                    tqdm.write(f"failed    {name}: {outcome.error}", file=sys.stderr)
            waiting = lost
    return failures


def measure_profiles(
    jobs: Sequence[TrainJob], experts: Mapping[str, str], workers: Workers, keeper: Any
) -> dict[str, str]:
    """Measure the profiles of experts that were made before.

    Args:
        jobs: of these experts; each has a profile_id.
        experts: their content hashes by name.
        workers: the training actors.
        keeper: the registry's actor.

    Returns:
        What went wrong, by expert.
    """
    failures = {}
    calls = [(job, experts[job.card.name], keeper) for job in jobs]
    with tqdm(total=len(jobs), desc="profile", unit="expert", disable=None) as bar:
        for index, result in workers.run("profile", calls, tick=lambda _: None):
            job = jobs[index]
            if isinstance(result, Failure):
                failures[job.card.name] = result.error
            else:
                content_hash = experts[job.card.name]
                ray.get(keeper.put_profile.remote(content_hash, job.profile_id, result))
            bar.update()
    return failures


def _steps_under_way(actors: Sequence[Any]) -> int:
    """Steps done of the jobs under way; an actor that does not answer at once counts as 0."""
    references = [actor.steps.remote() for actor in actors]
    ready, _ = ray.wait(references, num_returns=len(references), timeout=0.5) if actors else ([], 0)
    steps = 0
    for reference in ready:
        try:
            steps += ray.get(reference)
        except RayError:  # it died: `Workers` will see to it
            continue
    return steps


@dataclass(frozen=True)
class _Lost:
    """A trained expert whose actor died before it was published."""

    error: str


def _publish(folder: Folder, keeper: Any, job: TrainJob, result: tuple[Any, ...]) -> str | _Lost:
    """Keep one job's curve and expert; returns a line that says what was learnt."""
    rows, expert, profile = result
    if rows:
        results.write_table(folder, results.training_file(job.card.name), results.TRAINING, rows)
    try:
        # References are passed on: experts go from actor to actor, not through the driver.
        content_hash = ray.get(keeper.publish.remote(expert))
    except RayTaskError as error:
        if isinstance(error.cause, PhatgooseError):
            raise error.cause from None
        return _Lost(f"not published: {last_line(error)}")
    except RayError as error:
        return _Lost(f"not published: {last_line(error)}")
    if profile is not None:
        try:
            ray.get(keeper.put_profile.remote(content_hash, job.profile_id, profile))
        except RayError as error:  # it is measured again before a router needs it
            tqdm.write(f"no profile of {job.card.name}: {last_line(error)}", file=sys.stderr)
    if not rows:
        return "imported, without gates"
    losses = [f"{row['loss']:.2f}" for row in rows if row["split"] == "evaluation"]
    changes = [f"{losses[i]} -> {losses[i + 1]}" for i in range(0, len(losses), 2)]
    stages = dict.fromkeys(row["stage"] for row in rows)
    seconds = sum(max(row["seconds"] for row in rows if row["stage"] == s) for s in stages)
    said = [f"{stage} {change}" for stage, change in zip(stages, changes, strict=True)]
    return f"loss: {', '.join(said)}; {seconds:.0f} s"
