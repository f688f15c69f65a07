"""Several ranks that train one expert together, and look like one training actor to the scheduler.

    scheduler ──► Groups ──► a placement group: one bundle per rank
                     └─────► TrainGroup ──► its children: TrainActor of rank 0, 1, ...

A TrainGroup does no work itself, so it can tell a rank that failed from one that waits for the
others. Its ranks end with it. Its placement group would not: Ray removes that only with the job
which made it, or when it is told to; so the driver makes it, and removes it with the TrainGroup.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.scheduling.actor import Actor, Heartbeat, Location, log_to_run_folder
from harness.scheduling.workers import last_line
from harness.storage import Folder
from harness.training.actor import TrainActor, Trained, TrainSettings
from harness.training.checkpoints import FolderCheckpoints
from harness.training.job import TrainJob
from phatgoose.errors import OutOfMemory, PhatgooseError

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 30


class TrainGroup(Actor):
    """The ranks of one expert.

    Args:
        settings: of the ranks.
        options: what a rank asks of Ray, as `actor_options` says.
        group: a placement group with a bundle per rank.
    """

    def __init__(
        self, settings: TrainSettings, options: Mapping[str, Any], group: PlacementGroup
    ) -> None:
        log_to_run_folder(settings.run_dir, "group")
        super().__init__(settings.code)
        self._settings, self._folder = settings, Folder(settings.run_dir)
        self._options, self._group = dict(options), group
        self._ranks: list[Any] = []
        while not self._group.wait(_LOOK_SECONDS):
            _LOG.info("waiting for nodes with room for all ranks")
        self._start()
        self._location: Location = ray.get(self._ranks[0].location.remote())

    def location(self) -> Location:
        """Where the first rank is."""
        return self._location

    def heartbeat(self) -> Heartbeat:
        """Return how far the first rank is; the others are with it."""
        if not self._ranks:
            return Heartbeat(self._done, 0)
        heartbeat: Heartbeat = ray.get(self._ranks[0].heartbeat.remote())
        return heartbeat

    def train(self, job: TrainJob) -> Trained:
        """Make one expert; returns what `TrainActor.train` does."""
        if not self._ranks:
            self._start()
        checkpoint = FolderCheckpoints(self._folder, job.card.job, job.recipe).read()
        trained: Trained = self._first([rank.train.remote(job, checkpoint) for rank in self._ranks])
        return trained

    def profile(self, job: TrainJob, content_hash: str, registry_actor: Any) -> bytes:
        """Measure the profile of an expert that the registry has, on the first rank."""
        if not self._ranks:
            self._start()
        profile: bytes = self._first(
            [self._ranks[0].profile.remote(job, content_hash, registry_actor)]
        )
        return profile

    def _first(self, references: Sequence[Any]) -> Any:
        """What the first rank returned, once all have.

        If one rank fails, all are ended, as the others would wait for it. After an error of its own
        they are started anew for the next job. If one died, this actor ends too, and the scheduler
        finds a place for a new one.
        """
        try:
            return _results(references)[0]
        except RayActorError as error:
            _LOG.error("a rank died: %s", error)
            os._exit(1)
        except RayError as error:
            self._end()
            if isinstance(error, OutOfMemoryError):  # Ray's memory monitor ended a rank
                raise OutOfMemory(last_line(error)) from None
            cause = getattr(error, "cause", None)
            if isinstance(cause, PhatgooseError):
                raise cause from None
            raise

    def _start(self) -> None:
        """Start the ranks, each in its bundle, and let them meet."""
        remote = ray.remote(TrainActor)
        self._ranks = [
            remote.options(
                num_cpus=self._options["num_cpus"],
                num_gpus=self._options["num_gpus"],
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, rank),
            ).remote(self._settings, rank)
            for rank in range(self._settings.ranks)
        ]
        host, port = ray.get(self._ranks[0].open_rendezvous.remote())
        _results([rank.join.remote(host, port) for rank in self._ranks])

    def _end(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []


class TrainGroups:
    """Starts and ends groups for `Workers`; the arguments are those of TrainGroup."""

    def __init__(self, settings: TrainSettings, options: Mapping[str, Any]) -> None:
        self._settings, self._options = settings, dict(options)
        self._groups: dict[Any, PlacementGroup] = {}  # by the actor's handle

    def make(self) -> Any:
        """Start a group where there is room for all of its ranks, on few nodes if possible."""
        labels = dict(self._options.get("label_selector", {}))
        asks = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        bundle = {name: amount for name, amount in asks.items() if amount > 0}
        ranks = self._settings.ranks
        group = placement_group(
            [bundle] * ranks, strategy="PACK", bundle_label_selector=[labels] * ranks
        )
        remote = ray.remote(TrainGroup).options(
            num_cpus=0, label_selector=labels, max_concurrency=2
        )
        handle = remote.remote(self._settings, self._options, group)
        self._groups[handle] = group
        return handle

    def ended(self, handle: Any) -> None:
        """Free what a group had; its actor was ended."""
        remove_placement_group(self._groups.pop(handle))


def _results(references: Sequence[Any]) -> list[Any]:
    """What all ranks returned, in their order; the error of the first that fails, at once."""
    waiting = list(references)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        ray.get(done)
    results: list[Any] = ray.get(list(references))
    return results
