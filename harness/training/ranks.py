"""Several ranks that train one expert together. The scheduler sees them as one training actor.

    scheduler ──► TrainGroups ──► a placement group: one bundle per rank
                       └────────► TrainGroup ──► its children: TrainActor of rank 0, 1, ...

A TrainGroup does no work itself, so it can distinguish a rank that failed from one that waits for
the others. Its ranks end with it. Its placement group would not: Ray removes one only on request,
or with the job that created it. So the driver creates it, and removes it with the TrainGroup.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.registry.client import RegistryClient
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
    """An actor that manages the ranks of one expert.

    Args:
        settings: the settings of the ranks.
        options: the Ray options of a rank, see `actor_options`.
        group: a placement group with one bundle per rank.
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
        """Return the location of the first rank."""
        return self._location

    def heartbeat(self) -> Heartbeat:
        """Return the heartbeat of the first rank; the others keep pace with it."""
        if not self._ranks:
            return Heartbeat(self._done, 0)
        heartbeat: Heartbeat = ray.get(self._ranks[0].heartbeat.remote())
        return heartbeat

    def train(self, job: TrainJob, client: RegistryClient) -> Trained:
        """Make one expert, whose object the first rank writes; return what that rank returns."""
        if not self._ranks:
            self._start()
        checkpoint = FolderCheckpoints(self._folder, job.card.job, job.recipe).read()
        calls = [rank.train.remote(job, client, checkpoint) for rank in self._ranks]
        trained: Trained = self._first(calls)
        return trained

    def profile(self, job: TrainJob, content_hash: str, client: RegistryClient) -> bytes | None:
        """Measure and write the profile of an expert of the registry, on the first rank."""
        if not self._ranks:
            self._start()
        profile: bytes | None = self._first(
            [self._ranks[0].profile.remote(job, content_hash, client)]
        )
        return profile

    def _first(self, references: Sequence[Any]) -> Any:
        """Return the result of the first rank, once all ranks have returned.

        If a rank raises an error, all are ended, because the others would wait for it, and they are
        started again for the next job. If a rank died, this actor ends too, and the scheduler
        starts a new one elsewhere.
        """
        try:
            return _results(references)[0]
        except RayActorError as error:
            _LOG.error("a rank died: %s", error)
            os._exit(1)
        except RayError as error:
            self._end()
            if isinstance(error, OutOfMemoryError):  # Ray's memory monitor killed a rank
                raise OutOfMemory(last_line(error)) from None
            cause = getattr(error, "cause", None)
            if isinstance(cause, PhatgooseError):
                raise cause from None
            raise

    def _start(self) -> None:
        """Start each rank in its bundle, and connect the ranks."""
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
    """The groups of one `Workers`, to start and end. The arguments are those of TrainGroup."""

    def __init__(self, settings: TrainSettings, options: Mapping[str, Any]) -> None:
        self._settings, self._options = settings, dict(options)
        self._groups: dict[Any, PlacementGroup] = {}  # by the actor's handle

    def make(self) -> Any:
        """Start a group where all its ranks have room, on few nodes if possible."""
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
        """Remove the placement group of a group whose actor has ended."""
        remove_placement_group(self._groups.pop(handle))


def _results(references: Sequence[Any]) -> list[Any]:
    """Return the results of all ranks, in their order; raise the first error at once."""
    waiting = list(references)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        ray.get(done)
    results: list[Any] = ray.get(list(references))
    return results
