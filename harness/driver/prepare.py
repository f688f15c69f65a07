"""Fetch and write what a run needs before it is planned; many tasks at once, as Ray tasks."""

import itertools
from collections.abc import Callable, Sequence

import ray
from tqdm import tqdm
from transformers import AutoTokenizer

from harness.config.schema import RunConfig
from harness.planning.plan import Prepared, check_before_preparing, wants_profiles
from harness.scheduling.cluster import Cluster
from harness.tasks import TaskSpec, folder_of, prepare_all, prepare_here
from harness.tasks.store import is_written
from phatgoose.base import Base, bare_model, fingerprint, locate_base
from phatgoose.cache import cache_dir
from phatgoose.errors import PhatgooseError
from phatgoose.sentence_encoder import load_encoder

# One pass over their archive serves all tasks of these sources.
_TOGETHER = ("bigbench", "lm_eval")
# Fewer are not worth a cluster's start.
_FEW = 4


def prepare_run(
    config: RunConfig, make: Callable[[list[TaskSpec]], None] = prepare_here
) -> Prepared:
    """Fetch and write what a run needs before it is planned: its base, encoder and data.

    Args:
        config: the configuration.
        make: makes the files of tasks that have none.

    Raises:
        PhatgooseError: something of it cannot be had, or the configuration is refused before.
    """
    check_before_preparing(config)
    pool = config.pool_tasks()
    suites = {suite["name"]: config.suite_tasks(suite) for suite in config.suites}
    name, trust = config.base.name, config.base.trust_remote_code
    location = locate_base(name, revision=config.base.revision)
    model, linears = bare_model(name, location, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust)
    base = Base(name, fingerprint(location), model, tokenizer, linears)
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
