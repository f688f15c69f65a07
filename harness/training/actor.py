"""The actor that trains experts, one job after another, over one base."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray

from harness import run_folder
from harness.registry.client import RegistryClient
from harness.scheduling.actor import Actor, log_to_run_folder
from harness.scheduling.load_base import load_base_on_actor
from harness.scheduling.settings import BaseConfig
from harness.storage import Folder
from harness.tasks import TaskData, prepare_all, prepare_here
from harness.training.checkpoints import FolderCheckpoints
from harness.training.job import TrainJob, data_fingerprint, make_expert
from harness.training.profile import expert_profile
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.profile import ProfileConfig
from phatgoose.sentence_encoder import load_encoder
from phatgoose.training.engine import EngineFactory, PlainEngine
from phatgoose.training.train import CurveRow, Hooks

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """The settings that all training actors of a run share.

    Attributes:
        base: the base to load.
        base_fingerprint: the fingerprint that the base must have.
        run_dir: the run folder, for the log and the checkpoints.
        code: the driver's `code_version`.
        profile: how to measure profiles; None to measure none.
        checkpoint_seconds: the age at which a job's checkpoint is replaced.
        zero_stage: the stage of ZeRO: what the ranks of one expert partition.
        ranks: the number of ranks per expert. If there are several, each must `join` the others
            before its first job.
        mps: whether to train on the GPU of a Mac.
    """

    base: BaseConfig
    base_fingerprint: str
    run_dir: str
    code: str
    profile: ProfileConfig | None = None
    checkpoint_seconds: float = 60
    zero_stage: int = 0
    ranks: int = 1
    mps: bool = False


@dataclass(frozen=True)
class Trained:
    """The result of a training job: small, unless the actor does not see the registry's folder.

    Attributes:
        curve: the file of the training curve; empty if there is none.
        summary: the training curve in one line.
        content_hash: the hash of the expert, whose object the actor has written; None if it has
            not.
        expert: a reference to the expert if the actor has not written its object.
        profile: a reference to the bytes of its profile if the actor has not written them; None
            also if there are none.
    """

    curve: bytes
    summary: str
    content_hash: str | None = None
    expert: ray.ObjectRef | None = None
    profile: ray.ObjectRef | None = None


class TrainActor(Actor):
    """An actor that trains experts and measures profiles.

    Args:
        settings: the settings that all training actors of the run share.
        rank: the number of this actor among the ranks of one expert.
    """

    def __init__(self, settings: TrainSettings, rank: int = 0) -> None:
        log_to_run_folder(settings.run_dir, "train")
        super().__init__(settings.code)
        self._settings, self._rank = settings, rank
        self._folder = Folder(settings.run_dir)
        if settings.profile is not None:
            load_encoder(settings.profile.encoder)  # an error now is better than after a training
        from harness.training.engine import DeepSpeedEngine, start_deepspeed  # slow to import

        if settings.ranks == 1 and not settings.mps:
            start_deepspeed()
        self._engine: EngineFactory = functools.partial(
            DeepSpeedEngine, zero_stage=settings.zero_stage
        )
        if settings.mps:  # DeepSpeed's collectives do not run on it
            self._engine = PlainEngine
        self._base = load_base_on_actor(
            settings.base,
            settings.base_fingerprint,
            # Stage 3 moves partitions to the device. It may be too small for all weights.
            on_host=settings.zero_stage == 3,
            mps=settings.mps,
        )

    def open_rendezvous(self) -> tuple[str, int]:
        """Open the store where the ranks meet, on the first rank; return its address and port."""
        from harness.training.rendezvous import open_rendezvous

        self._store = open_rendezvous(self._settings.ranks)
        return self._store.host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Join the other ranks at the first rank's store. Every rank must call it."""
        from harness.training.engine import start_deepspeed
        from harness.training.rendezvous import join_rendezvous

        ranks = self._settings.ranks
        store = self._store if self._rank == 0 else join_rendezvous(host, port, ranks)
        start_deepspeed(store, self._rank, ranks)

    def train(
        self, job: TrainJob, client: RegistryClient, checkpoint: bytes | None = None
    ) -> Trained | None:
        """Make one expert and write its object; return None on a rank that is not the first.

        Args:
            job: the expert to make. If there are several ranks, all must get the same job.
            client: where to write the expert and its profile.
            checkpoint: the job's checkpoint; None to read it from the run folder.
        """
        rows: list[dict[str, Any]] = []
        self._steps = 0

        def report(progress: CurveRow) -> None:
            rows.append({"expert": job.card.name, "job": job.card.job, **asdict(progress)})
            self._steps += progress.split == "train"
            self._beat()

        _LOG.info("training %s (job %s)", job.card.name, job.card.job)
        checkpoints = FolderCheckpoints(
            self._folder,
            job.card.job,
            job.recipe,
            self._settings.checkpoint_seconds,
            given=checkpoint,
            writes=self._rank == 0,
        )
        hooks = Hooks(self._engine, report, checkpoints, self._beat)
        expert = make_expert(self._base, job, lambda: self._data(job), hooks)
        _LOG.info("trained %s: %s", job.card.name, expert.card.metrics)
        self._steps = 0
        if self._rank > 0:
            return None
        profile = None
        if job.profile_id is not None:
            try:
                profile = self._measure(job, expert)
            # Do not lose the expert, too: the profile can be measured again.
            except Exception as error:
                _LOG.warning("no profile of %s: %s", job.card.name, error)
        self._beat()
        trained = hand_over(client, job, expert, rows, profile)
        self._beat()
        return trained

    def profile(self, job: TrainJob, content_hash: str, client: RegistryClient) -> bytes | None:
        """Measure the profile of an expert of the registry, and write it.

        Return its bytes if this actor does not see the registry's folder.
        """
        assert job.profile_id is not None
        profile = self._measure(job, client.load(content_hash))
        written = client.put_profile(content_hash, job.profile_id, profile)
        return None if written else profile

    def _data(self, job: TrainJob) -> list[TaskData]:
        """Return the data of the job's tasks, after checking that it is the plan's."""
        data = prepare_all(job.tasks, functools.partial(prepare_here, beat=self._beat))
        found = data_fingerprint(data)
        if found != job.card.data_fingerprint:
            raise PhatgooseError(
                f"expert {job.card.name}: the data on this node is {found[:12]}, and the plan was "
                f"made with {job.card.data_fingerprint[:12]}. Empty the cache on the node that is "
                "out of date."
            )
        return data

    def _measure(self, job: TrainJob, expert: Expert) -> bytes:
        config = self._settings.profile
        assert config is not None  # the plan's, where any job has a profile
        (data,) = self._data(job)
        return expert_profile(self._base, expert, data, config, self._beat)


def hand_over(
    client: RegistryClient,
    job: TrainJob,
    expert: Expert,
    rows: Sequence[Mapping[str, Any]],
    profile: bytes | None = None,
) -> Trained:
    """Write an expert's object and profile; return what the driver needs to finish the job.

    Args:
        client: where to write them. What cannot be written is returned by reference.
        job: the job that made the expert.
        expert: the expert.
        rows: the rows of its training curve.
        profile: the bytes of its profile, if it has one.
    """
    content_hash, left = client.put_object(expert), profile
    if content_hash is not None and job.profile_id is not None and profile is not None:
        left = None if client.put_profile(content_hash, job.profile_id, profile) else profile
    file = run_folder.training_file(job.card.name)
    return Trained(
        run_folder.table_bytes(file, run_folder.TRAINING, [*map(dict, rows)]) if rows else b"",
        summary_of(rows),
        content_hash,
        None if content_hash is not None else ray.put(expert),
        None if left is None else ray.put(left),
    )


def summary_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a training curve in one line."""
    if not rows:
        return "imported, without gates"
    losses = [f"{row['loss']:.2f}" for row in rows if row["split"] == "evaluation"]
    changes = [f"{losses[i]} -> {losses[i + 1]}" for i in range(0, len(losses), 2)]
    stages = dict.fromkeys(row["stage"] for row in rows)
    seconds = sum(max(row["seconds"] for row in rows if row["stage"] == s) for s in stages)
    said = [f"{stage} {change}" for stage, change in zip(stages, changes, strict=True)]
    return f"loss: {', '.join(said)}; {seconds:.0f} s"
