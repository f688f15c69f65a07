"""The actor that trains experts: one job after the other, over one base."""

import functools
import logging
from dataclasses import asdict, dataclass
from typing import Any

import ray

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
    """What all training actors of a run are given.

    Attributes:
        base: which base to load.
        base_fingerprint: what it must be.
        run_dir: where to write the log and the checkpoints.
        code: what `code_version` said in the driver's process.
        profile: how profiles are measured; None if none are.
        checkpoint_seconds: how old a job's checkpoint gets before it is replaced.
        zero_stage: what the ranks of one expert partition among them.
        ranks: how many there are; of several, each must `join` the others before its first job.
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
    """What a training actor made of a job.

    Attributes:
        curve: the rows of the training curve.
        expert: a reference to the expert.
        profile: a reference to the bytes of its profile; None if it has none.
    """

    curve: list[dict[str, Any]]
    expert: ray.ObjectRef
    profile: ray.ObjectRef | None = None


class TrainActor(Actor):
    """Trains experts and measures profiles, in a process of its own.

    Args:
        settings: what all training actors of the run are given.
        rank: which of the ranks of one expert this actor is.
    """

    def __init__(self, settings: TrainSettings, rank: int = 0) -> None:
        log_to_run_folder(settings.run_dir, "train")
        super().__init__(settings.code)
        self._settings, self._rank = settings, rank
        self._folder = Folder(settings.run_dir)
        if settings.profile is not None:
            load_encoder(settings.profile.encoder)  # to fail now, if it must, not after a training
        from harness.training.engine import DeepSpeedEngine, start_deepspeed  # slow to import

        if settings.ranks == 1 and not settings.mps:
            start_deepspeed()
        self._engine: EngineFactory = functools.partial(
            DeepSpeedEngine, zero_stage=settings.zero_stage
        )
        if settings.mps:  # on which DeepSpeed's collectives do not run
            self._engine = PlainEngine
        self._base = load_base_on_actor(
            settings.base,
            settings.base_fingerprint,
            # Stage 3 puts its partitions on the device; the whole may be too large for it.
            on_host=settings.zero_stage == 3,
            mps=settings.mps,
        )

    def open_rendezvous(self) -> tuple[str, int]:
        """Of the first rank: open the place where the ranks meet; returns its address and port."""
        from harness.training.rendezvous import open_rendezvous

        self._store = open_rendezvous(self._settings.ranks)
        return self._store.host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks there, which must do the same."""
        from harness.training.engine import start_deepspeed
        from harness.training.rendezvous import join_rendezvous

        ranks = self._settings.ranks
        store = self._store if self._rank == 0 else join_rendezvous(host, port, ranks)
        start_deepspeed(store, self._rank, ranks)

    def train(self, job: TrainJob, checkpoint: bytes | None = None) -> Trained | None:
        """Make one expert; returns None on a rank that is not the first.

        Args:
            job: what to make; of several ranks, all must be given it.
            checkpoint: the job's checkpoint; it is looked for if None.
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
                profile = ray.put(self._measure(job, expert))
            # An expert is worth more than its profile, which can be measured again.
            except Exception as error:
                _LOG.warning("no profile of %s: %s", job.card.name, error)
        return Trained(rows, ray.put(expert), profile)

    def profile(self, job: TrainJob, content_hash: str, registry_actor: Any) -> bytes:
        """Measure the profile of an expert that the registry has; returns its bytes."""
        return self._measure(job, ray.get(registry_actor.load.remote(content_hash)))

    def _beat(self) -> None:
        """Something was done: a long evaluation must not look like a hang."""
        self._done += 1

    def _data(self, job: TrainJob) -> list[TaskData]:
        """The data of the job's tasks, which must be those of the plan."""
        data = prepare_all(job.tasks, functools.partial(prepare_here, beat=self._beat))
        found = data_fingerprint(data)
        if found != job.card.data_fingerprint:
            raise PhatgooseError(
                f"expert {job.card.name}: the data on this node is {found[:12]}, the plan was made "
                f"with {job.card.data_fingerprint[:12]}: empty the cache on the one that is out of "
                "date"
            )
        return data

    def _measure(self, job: TrainJob, expert: Expert) -> bytes:
        config = self._settings.profile
        assert config is not None  # the plan's, where any job has a profile
        (data,) = self._data(job)
        return expert_profile(self._base, expert, data, config, self._beat)
