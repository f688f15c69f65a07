"""The disturbed run: many tiny experts, two suites and a few routers, all made here.

`demo` is the suite of that name with toy documents in place of BIG-bench's. `held_in` is the
pool's own evaluation splits.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.load import load_config
from harness.tasks import TaskSpec, prepare_all
from tests.support.tiny import make_llama
from tests.support.tiny_encoder import make_encoder
from tests.support.toy import choice_task, from_archive, generation_task, write_archive

_ANSWERS = ("goose", "five", "nine", "yes", "no", "swan")


@dataclass(frozen=True)
class Workload:
    """The parameters of the run, except for its folder.

    Attributes:
        folder: the folder of the base, the encoder and the data.
        experts: the number of experts.
        steps: the optimizer steps of the first stage of each expert.
    """

    folder: Path
    experts: int
    steps: int

    @property
    def names(self) -> list[str]:
        """Return the names of the experts."""
        return [f"e{number:02d}" for number in range(self.experts)]

    def arguments(self, run_dir: Path) -> list[str]:
        """Return the command line of the run in a folder, which also contains its registry."""
        return [
            f"base={self.folder / 'base'}",
            f"run.dir={run_dir}",
            "pool=demo",
            "pool.name=chaos",
            "pool.general=e00",
            "~pool.tasks",
            *(f"+pool.tasks.{name}.members=[{name}]" for name in self.names),
            "suite=[demo,held_in]",
            "suite.limit=6",
            "suite.max_new_tokens=4",
            "router=[base,phatgoose,merged,average_activation,single:e00,single:e03]",
            "train.rank=2",
            f"train.lora.steps={self.steps}",
            f"train.gates.steps={self.steps // 2}",
            "train.batch_size=4",
            "train.micro_batch_size=4",
            "train.evaluation_examples=4",
            f"profile.encoder={self.folder / 'encoder'}",
            "profile.embedded_examples=8",
            "profile.activation_examples=4",
            "chunk_tokens=20",
            "shard_tokens=20",
            "cluster.checkpoint_seconds=1",
        ]

    def prepare(self) -> None:
        """Make the base, the encoder and the tasks' data; the data go to the cache."""
        make_llama(self.folder / "base")
        make_encoder(self.folder / "encoder")
        config = load_config(self.arguments(self.folder / "run"))
        specs = config.pool_tasks()
        for suite in config.suites:
            specs += config.suite_tasks(suite)
        archive = write_archive(self.folder / "toys.tar.gz", _tasks(specs))
        prepare_all(specs, from_archive(archive))


def _tasks(specs: list[TaskSpec]) -> Mapping[str, Any]:
    """Return a toy task for each member of these tasks; two of three are generated."""
    draw = random.Random(0)
    members = sorted({member for spec in specs for member in spec.members})
    tasks: dict[str, Any] = {}
    for number, member in enumerate(members):
        first = f"{member.replace('/', ' ').replace('_', ' ')}:"
        if number % 3 == 2:
            tasks[member] = choice_task(first, "yes", "no")
        else:
            tasks[member] = generation_task(first, draw.choice(_ANSWERS))
    return tasks
