"""Check who writes trained experts on a real Ray of two nodes, with a registry in each place."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as Nodes

from harness import run_folder
from harness.registry import Registry
from harness.registry.client import RegistryClient
from harness.registry.files import Record, object_file
from harness.registry.verify import Check, verify
from harness.scheduling.actor import Actor, code_version
from harness.scheduling.cluster import actor_options, room
from harness.scheduling.progress import StageProgress
from harness.scheduling.settings import ClusterConfig
from harness.scheduling.workers import Workers
from harness.source_code import TRAINING, code_of, digest
from harness.storage import Folder
from harness.tasks import TaskSpec
from harness.training.actor import Trained, hand_over
from harness.training.job import TrainJob
from harness.training.job_table import JobTable
from harness.training.stage import Training, measure_profiles
from phatgoose.expert import Expert
from phatgoose.profile import Profile
from phatgoose.training.recipe import Recipe, Stage
from tests.support.registries import BASE, make_expert

# Actors cannot import a test module, so it is pickled by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.slow(seconds=40)

ID = "0123456789abcdef"
EXPERTS = 4
RECIPE = Recipe(
    rank=2, scale=0.5, lora=Stage(steps=2, lr=0.1), gates=None, batch_size=1, micro_batch_size=1
)
# A path that leads to another folder in each process with another working directory, as one path
# does on machines with disks of their own.
PER_PROCESS = "/proc/self/cwd/pool"


class Trainer(Actor):
    """A training actor whose experts are ready; its working directory can be its own.

    It trains when an actor on the other node is ready, too.
    """

    def __init__(self, started: Path, folder: Path | None) -> None:
        super().__init__(code_version())
        self._started = started
        started.mkdir(exist_ok=True)
        (started / str(os.getpid())).touch()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)

    def train(self, job: TrainJob, client: RegistryClient) -> Trained:
        while len(list(self._started.iterdir())) < 2:
            time.sleep(0.01)
        number = int(job.card.job, 16)
        row = {"expert": job.card.name, "job": job.card.job, "stage": "lora", "lr": 0.1}
        row |= {"exact_match": None, "tokens": 1, "seconds": 0.5, "loss": 1.0}
        rows = [{**row, "split": "evaluation", "step": step} for step in (0, 2)]
        return hand_over(client, job, make_expert(number), rows, profile_of(number))

    def profile(self, job: TrainJob, content_hash: str, client: RegistryClient) -> bytes | None:
        number = int(client.load(content_hash).card.job, 16)
        assert job.profile_id is not None
        data = profile_of(number)
        return None if client.put_profile(content_hash, job.profile_id, data) else data


class Records(Registry):
    """A registry that notes on disk which methods carried tensors.

    Before its first record, the object disappears, as if `gc` had found it without a name.
    """

    def __init__(self, uri: str, notes: Path) -> None:
        super().__init__(uri, BASE)
        self._notes, self._loses = notes, True

    def put_record(self, job: str, record: Record) -> Record | None:
        if self._loses:
            self.folder.delete(object_file(record.object))
        self._loses = False
        return super().put_record(job, record)

    def publish(self, expert: Expert, **options: Any) -> str:
        self._note("publish")
        return super().publish(expert, **options)

    def put_profile(self, content_hash: str, profile_id: str, data: bytes) -> None:
        self._note("put_profile")
        super().put_profile(content_hash, profile_id, data)

    def load(self, content_hash: str) -> Expert:
        self._note("load")
        return super().load(content_hash)

    def _note(self, method: str) -> None:
        with self._notes.open("a") as file:
            file.write(f"{method}\n")


def profile_of(number: int) -> bytes:
    """Return the bytes of a small profile."""
    linear, embeddings_NS = "layers.0.q", torch.full((2, 3), float(number))
    profile = Profile(
        {linear: torch.ones(4)}, {linear: torch.ones(2)}, embeddings_NS, "tiny", "e" * 64, "a task"
    )
    return profile.to_bytes()


def job(number: int) -> TrainJob:
    expert = make_expert(number)
    return TrainJob(expert.card, (TaskSpec(expert.card.name, ("task",)),), RECIPE, ID)


@pytest.fixture(scope="module")
def two_nodes(own_ray: Path) -> Iterator[None]:
    """Provide a head without work, and two nodes of one core."""
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    head = {**common, "num_cpus": 0, "include_dashboard": False}
    cluster = Nodes(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **common)
        ray.init(address=cluster.address, namespace="phatgoose", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize("place", ["shared folder", "another disk", "bucket"])
def test_training_actors_write_what_they_can(
    two_nodes: None, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    """Check that tensors take the way past the registry actor wherever there is one."""
    uri, notes = str(tmp_path / "pool"), tmp_path / "notes"
    here = Records
    if place == "another disk":
        uri = PER_PROCESS

        class OnHead(Records):
            def __init__(self, uri: str, notes: Path) -> None:
                os.chdir(tmp_path)
                super().__init__(uri, notes)

        here = OnHead
        Registry(tmp_path / "trainer" / "pool", BASE).publish(make_expert(99))
    elif place == "bucket":
        uri = request.getfixturevalue("s3").uri(f"{tmp_path.name}/pool")
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    options = {"num_cpus": 0, "runtime_env": {"env_vars": keys}} if keys else {"num_cpus": 0}
    registry_actor: Any = ray.remote(here).options(**options).remote(uri, notes)
    asked = actor_options(ClusterConfig(gpus_per_actor=0), {})
    remote = ray.remote(Trainer).options(**{**asked, **options, **asked}, max_concurrency=2)
    own = tmp_path / "trainer" if place == "another disk" else None
    workers = Workers(lambda: remote.remote(tmp_path / "started", own), lambda: room(asked))
    jobs = [job(number) for number in range(EXPERTS)]
    folder = Folder(tmp_path / "run")
    tokens = dict.fromkeys((job.card.job for job in jobs), 2)
    elsewhere = tmp_path / "trainer" / "pool"
    before = Folder(elsewhere).names() if place == "another disk" else []
    try:
        with StageProgress(folder, "train", 2 * EXPERTS, "token", EXPERTS) as progress:
            training = Training(
                jobs, folder, workers, registry_actor, JobTable(folder, jobs, tokens, {}), progress
            )
            assert training.run() == {}
        assert len({location.node for location, _ in workers.locations}) == 2
        registry = Registry(tmp_path / "pool" if uri == PER_PROCESS else uri, BASE)
        experts = {expert.card.name: expert for expert in map(make_expert, range(EXPERTS))}
        hashes = {name: expert.content_hash() for name, expert in experts.items()}
        assert training.experts == registry.manifest().experts == hashes
        for profile_file in registry.folder.names("profiles/"):
            registry.folder.delete(profile_file)
        with StageProgress(folder, "profile", EXPERTS, "expert", EXPERTS) as progress:
            assert measure_profiles(jobs, hashes, workers, registry_actor, progress) == {}
    finally:
        workers.close()
    rows = run_folder.read_table(folder, run_folder.JOBS_FILE, run_folder.JOBS).to_pylist()
    assert [row["state"] for row in rows] == ["done"] * EXPERTS
    # Who has the expert writes a lost object again; otherwise the job runs again.
    assert sum(row["starts"] for row in rows) == EXPERTS + (place != "another disk")
    said = notes.read_text().split() if notes.exists() else []
    counts = {method: said.count(method) for method in set(said)}
    if place == "another disk":
        assert counts == {"publish": EXPERTS, "put_profile": 2 * EXPERTS, "load": EXPERTS}
        assert Folder(elsewhere).names() == before
    else:
        assert counts == {}
    assert verify(registry.folder, every_manifest=True) == Check(EXPERTS)
    assert len(registry.folder.names("profiles/")) == EXPERTS
    for number, (name, content) in enumerate(hashes.items()):
        profile = registry.profile(content, ID)
        assert profile.embeddings_NS[0, 0] == number
        record = registry.records([experts[name].card.job])[experts[name].card.job]
        assert (record.object, record.name) == (content, name)
        assert record.code == digest(code_of(TRAINING))
        curve = run_folder.read_table(
            folder, run_folder.training_file(name), run_folder.TRAINING
        ).to_pylist()
        assert [row["step"] for row in curve] == [0, 2]
    assert registry.code(digest(code_of(TRAINING))) == code_of(TRAINING)
    assert not [name for name in registry.folder.names() if name.startswith("check-")]
