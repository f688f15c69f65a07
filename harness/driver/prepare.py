"""Preparing many tasks at once, as Ray tasks: data sets are fetched and written side by side."""

from collections.abc import Callable, Sequence

import ray
from tqdm import tqdm

from harness.scheduling.cluster import Cluster
from harness.tasks import TaskSpec, folder_of, prepare_here
from harness.tasks.store import is_written
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError

# One pass over their archive serves all tasks of these sources.
_TOGETHER = ("bigbench", "lm_eval")
# Fewer are not worth a cluster's start.
_FEW = 4


def preparer(cluster: Cluster) -> Callable[[list[TaskSpec]], None]:
    """Makes the files of tasks: of a few in this process, of many on the cluster."""

    def make(specs: list[TaskSpec]) -> None:
        together = [spec for spec in specs if spec.source in _TOGETHER]
        alone = [spec for spec in specs if spec.source not in _TOGETHER]
        if len(alone) <= _FEW:
            prepare_here(specs)
            return
        prepare_here(together)
        cluster.connect()
        _prepare_on_cluster(alone)

    return make


def _prepare_on_cluster(specs: Sequence[TaskSpec]) -> None:
    """One Ray task per data set; all are tried before the faulty ones are reported.

    Raises:
        PhatgooseError: some could not be made, or were made where this process does not see them.
    """
    where = {"env_vars": {"PHATGOOSE_CACHE": str(cache_dir())}}
    remote = ray.remote(_prepare).options(num_cpus=1, max_retries=3, runtime_env=where)
    waiting = {remote.remote(spec): spec for spec in specs}
    problems = []
    with tqdm(total=len(specs), desc="preparing", unit="task") as bar:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            spec = waiting.pop(done)
            problem = ray.get(done)
            if problem is None and not is_written(folder_of(spec)):
                problem = (
                    f"task {spec.name}: another node wrote its files where this one does not see "
                    "them: set PHATGOOSE_CACHE to a folder that all nodes share"
                )
            if problem is not None:
                problems.append(problem)
            bar.update()
    if problems:
        shown = "; ".join(problems[:3]) + (" ..." if len(problems) > 3 else "")
        raise PhatgooseError(f"{len(problems)} of {len(specs)} tasks cannot be prepared: {shown}")


def _prepare(spec: TaskSpec) -> str | None:
    """Make one task's files; says what is wrong with its data."""
    try:
        prepare_here([spec])
    except PhatgooseError as error:
        return str(error)
    return None
