"""Fetch and write what a run needs before it is planned. Many tasks are prepared on Ray."""

import itertools
from collections.abc import Callable, Sequence

import ray
from tqdm import tqdm
from transformers import AutoTokenizer

from harness.config.schema import RunConfig
from harness.evaluation.overlap import find_overlaps, not_compared
from harness.planning.plan import Prepared, check_before_preparing, wants_profiles
from harness.scheduling.cluster import Cluster
from harness.tasks import TaskData, TaskSpec, folder_of, prepare_all, prepare_here
from harness.tasks.adapters import adapter_folder
from harness.tasks.store import is_written
from phatgoose.base import Base, bare_model, fingerprint, locate_base
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from phatgoose.sentence_encoder import load_encoder

# One pass over their archive serves all tasks of these sources.
_TOGETHER = ("bigbench", "lm_eval")
# Up to this many tasks are not worth starting a cluster for.
_FEW = 4
# So many training examples are compared with a suite in a few seconds. A Ray task gets so many of
# the pool's tasks, since it indexes the suite first.
_FEW_EXAMPLES, _COMPARED = 100_000, 4


def prepare_run(
    config: RunConfig,
    make: Callable[[list[TaskSpec]], None] = prepare_here,
    compare: Callable[[list[TaskData], list[TaskData]], None] = lambda pool, suite: None,
) -> Prepared:
    """Fetch and write what a run needs before it is planned: its base, encoder and data.

    Args:
        config: the configuration.
        make: writes the files of tasks that have none.
        compare: compares a pool's training data with a suite, so that planning finds the overlaps
            in the cache.

    Raises:
        PhatgooseError: the configuration is invalid, or something cannot be fetched or written.
    """
    check_before_preparing(config)
    pool = config.pool_tasks()
    suites = {suite["name"]: config.suite_tasks(suite) for suite in config.suites}
    name, trust = config.base.name, config.base.trust_remote_code
    location = locate_base(name, revision=config.base.revision)
    model, linears = bare_model(name, location, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust)
    base = Base(name, fingerprint(location), model, tokenizer, linears)
    for spec in pool:
        if spec.adapter is not None:
            adapter_folder(spec.adapter)  # so that planning finds it without a download
    data = iter(prepare_all([*pool, *itertools.chain(*suites.values())], make))
    pool_data = list(itertools.islice(data, len(pool)))
    suites_data = {suite: list(itertools.islice(data, len(s))) for suite, s in suites.items()}
    for suite_data in suites_data.values():
        compare(pool_data, suite_data)
    return Prepared(
        base=base,
        pool=pool_data,
        suites=suites_data,
        encoder_fingerprint=(
            load_encoder(config.profile.encoder).fingerprint if wants_profiles(config) else None
        ),
    )


def preparer(cluster: Cluster) -> Callable[[list[TaskSpec]], None]:
    """Return a function that prepares a few tasks in this process, and many on the cluster."""

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


def comparer(cluster: Cluster) -> Callable[[list[TaskData], list[TaskData]], None]:
    """Return a function that compares much training data with a suite on the cluster."""

    def compare(pool: list[TaskData], suite: list[TaskData]) -> None:
        waiting = not_compared(pool, suite)
        if sum(data.counts["train"] for data in waiting) <= _FEW_EXAMPLES:
            return  # planning does it
        cluster.connect()
        parts = [waiting[place : place + _COMPARED] for place in range(0, len(waiting), _COMPARED)]
        remote = ray.remote(find_overlaps).options(
            num_cpus=1, max_retries=3, runtime_env=_same_cache()
        )
        suite_reference = ray.put(suite)
        open_parts = [remote.remote(part, suite_reference) for part in parts]
        with tqdm(total=len(waiting), desc="overlap", unit="task") as bar:
            while open_parts:
                (done,), open_parts = ray.wait(open_parts)
                ray.get(done)
                bar.update(min(_COMPARED, bar.total - bar.n))

    return compare


def _same_cache() -> dict[str, dict[str, str]]:
    """Return the runtime environment of Ray tasks that write to the cache."""
    return {"env_vars": {"PHATGOOSE_CACHE": str(cache_dir())}}


def _prepare_on_cluster(specs: Sequence[TaskSpec]) -> None:
    """Prepare each task in a Ray task; try all before reporting failures.

    Raises:
        PhatgooseError: some tasks could not be prepared, or this process cannot see their files.
    """
    remote = ray.remote(_prepare).options(num_cpus=1, max_retries=3, runtime_env=_same_cache())
    waiting = {remote.remote(spec): spec for spec in specs}
    problems = []
    with tqdm(total=len(specs), desc="preparing", unit="task") as bar:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            spec = waiting.pop(done)
            problem = ray.get(done)
            if problem is None and not is_written(folder_of(spec)):
                problem = (
                    f"task {spec.name}: another node wrote its files where this node cannot see "
                    "them. Set PHATGOOSE_CACHE to a folder that all nodes share."
                )
            if problem is not None:
                problems.append(problem)
            bar.update()
    if problems:
        shown = "; ".join(problems[:3]) + (" ..." if len(problems) > 3 else "")
        raise PhatgooseError(f"{len(problems)} of {len(specs)} tasks cannot be prepared: {shown}")


def _prepare(spec: TaskSpec) -> str | None:
    """Prepare one task; return what is wrong with its data, or None."""
    try:
        prepare_here([spec])
    except PhatgooseError as error:
        return str(error)
    return None
