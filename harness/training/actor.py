"""The actor that trains experts: one job after the other, over one base."""

import functools
from dataclasses import asdict
from typing import Any

import ray

from harness.scheduling.actor import Actor
from harness.scheduling.cluster import log_to_run_folder
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
from phatgoose.training.train import CurveRow, Hooks


class TrainActor(Actor):
    """Trains experts and measures profiles, in a process of its own.

    Args:
        base: which base to load.
        fingerprint: what it must be.
        profile: how profiles are measured; None if none are.
        run_dir: where to write the log and the checkpoints.
        checkpoint_seconds: how old a job's checkpoint gets before it is replaced.
        zero_stage: what the ranks of one expert partition among them.
        rank: which of them this actor is.
        ranks: how many there are; of several, each must `join` the others before its first job.
    """

    def __init__(
        self,
        base: BaseConfig,
        fingerprint: str,
        profile: ProfileConfig | None,
        run_dir: str,
        code: str,
        checkpoint_seconds: float = 60,
        zero_stage: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        log_to_run_folder(run_dir, "train")
        super().__init__(code)
        self._folder, self._checkpoint_seconds = Folder(run_dir), checkpoint_seconds
        self._profile = profile
        if profile is not None:
            load_encoder(profile.encoder)  # to fail now, if it must, and not after a training
        from harness.training.engine import DeepSpeedEngine, start_deepspeed  # slow to import

        self._rank, self._ranks = rank, ranks
        if ranks == 1:
            start_deepspeed()
        self._engine = functools.partial(DeepSpeedEngine, zero_stage=zero_stage)
        # Stage 3 puts its partitions on the device; the whole may be too large for it.
        self._base = load_base_on_actor(base, fingerprint, on_host=zero_stage == 3)

    def open_store(self) -> tuple[str, int]:
        """Of the first rank: open the place where the ranks meet; returns its address and port."""
        from harness.training.rendezvous import open_store

        self._store = open_store(self._ranks)
        return self._store.host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks there, which must do the same."""
        from harness.training.engine import start_deepspeed
        from harness.training.rendezvous import join_store

        store = self._store if self._rank == 0 else join_store(host, port, self._ranks)
        start_deepspeed(store, self._rank, self._ranks)

    def train(
        self, job: TrainJob, checkpoint: bytes | None = None
    ) -> tuple[list[dict[str, Any]], ray.ObjectRef, ray.ObjectRef | None] | None:
        """Make one expert.

        Args:
            job: what to make; of several ranks, all must be given it.
            checkpoint: the job's checkpoint; it is looked for if None.

        Returns:
            Its training curve, a reference to the expert, and one to its profile's bytes if it has
            a profile. None of a rank that is not the first.
        """
        rows: list[dict[str, Any]] = []
        self._steps = 0

        def report(progress: CurveRow) -> None:
            rows.append({"expert": job.card.name, "job": job.card.job, **asdict(progress)})
            self._steps += progress.split == "train"
            self._beat()

        print(f"training {job.card.name} (job {job.card.job})", flush=True)
        checkpoints = FolderCheckpoints(
            self._folder,
            job.card.job,
            job.recipe,
            self._checkpoint_seconds,
            given=checkpoint,
            writes=self._rank == 0,
        )
        hooks = Hooks(self._engine, report, checkpoints, self._beat)
        expert = make_expert(self._base, job, lambda: self._data(job), hooks)
        print(f"trained {job.card.name}: {expert.card.metrics}", flush=True)
        self._steps = 0
        if self._rank > 0:
            return None
        profile = None
        if job.profile_id is not None:
            try:
                profile = ray.put(self._measure(job, expert))
            # An expert is worth more than its profile, which can be measured again.
            except Exception as error:
                print(f"no profile of {job.card.name}: {error}", flush=True)
        return rows, ray.put(expert), profile

    def profile(self, job: TrainJob, content_hash: str, keeper: Any) -> bytes:
        """Measure the profile of an expert that the registry has; returns its bytes."""
        return self._measure(job, ray.get(keeper.load.remote(content_hash)))

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
        assert self._profile is not None  # the plan's, where any job has a profile
        (data,) = self._data(job)
        return expert_profile(self._base, expert, data, self._profile, self._beat)
