"""Fetch and write what a run needs before it is planned. Many tasks are prepared on Ray."""

import itertools
from collections.abc import Callable, Sequence

import ray
from tqdm import tqdm
from transformers import AutoTokenizer

from harness.config.schema import RunConfig
from harness.planning.plan import Prepared, check_before_preparing, wants_profiles
from harness.scheduling.cluster import Cluster
from harness.tasks import TaskSpec, folder_of, prepare_all, prepare_here
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


def prepare_run(
    config: RunConfig, make: Callable[[list[TaskSpec]], None] = prepare_here
) -> Prepared:
    """Fetch and write what a run needs before it is planned: its base, encoder and data.

    Args:
        config: the configuration.
        make: writes the files of tasks that have none.

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
    return Prepared(
        base=base,
        pool=list(itertools.islice(data, len(pool))),
        suites={suite: list(itertools.islice(data, len(s))) for suite, s in suites.items()},
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


def _prepare_on_cluster(specs: Sequence[TaskSpec]) -> None:
    """Prepare each task in a Ray task; try all before reporting failures.

    Raises:
        PhatgooseError: some tasks could not be prepared, or this process cannot see their files.
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
