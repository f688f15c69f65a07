"""The whole benchmark in one command: python -m harness.run pool=demo

Plan and check, train what has not been trained, evaluate what has not been answered, report.
"""

import functools
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import results
from harness.config import CONF, RunConfig, groups, load_config
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

if TYPE_CHECKING:
    from harness.cluster import Cluster
    from harness.jobs import Workers
    from harness.plan import Plan
    from harness.registry import Registry

_PACKAGES = ("phatgoose", "torch", "transformers", "ray", "deepspeed", "lm_eval", "pyarrow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        run(load_config(arguments))
    except PhatgooseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(config: RunConfig) -> None:
    """Carry one configuration through its stages.

    Raises:
        PhatgooseError: a check before work failed, no expert could be had, or, after all else was
            done, some experts, profiles or routers had to be left out.
    """
    _be_quiet()
    # Imported here, so that a mistyped configuration is refused at once.
    from harness.cluster import Cluster, actor_count
    from harness.plan import make_plan, needs_profiles
    from harness.prepare import preparer
    from harness.report import make_report

    if config.stages == ["report"] and not Folder(config.run.dir).exists(results.RUN_FILE):
        raise PhatgooseError(
            f"run.dir={config.run.dir} holds no run to report: run the stages train and evaluate "
            "before"
        )
    started = time.time()
    problems: list[str] = []
    with Cluster() as cluster:
        plan = make_plan(config, preparer(cluster))
        print(plan.describe(), flush=True)
        to_train = "train" in config.stages and bool(plan.open_jobs)
        if to_train:
            cluster.connect()
            actor_count(config.cluster, config.cluster.train_nodes)  # no room: an error
        record = _record(config, plan, started)
        results.write_run(plan.folder, record)
        results.write_table(plan.folder, results.OVERLAP_FILE, results.OVERLAP, _overlaps(plan))
        if to_train:
            problems += _train(plan)
        if "evaluate" in config.stages:
            if needs_profiles(plan.routers.values()):
                problems += _measure_profiles(plan, cluster)
            problems += _evaluate(plan, cluster)
    minutes = (time.time() - started) / 60
    record["calls"][-1] |= {
        "finished": _time(time.time()),
        "minutes": round(minutes, 2),
        "problems": problems,
    }
    results.write_run(plan.folder, record)
    if "report" in config.stages:
        print("\n" + make_report(plan.folder), end="")
    print(f"done in {minutes:.1f} min; everything is in {plan.folder}")
    if problems:
        raise PhatgooseError(
            f"{len(problems)} things could not be done ({'; '.join(problems)}): the same command "
            "tries them again"
        )


def _overlaps(plan: "Plan") -> list[dict[str, Any]]:
    """Rows of overlap.parquet."""
    suite = plan.config.suite["name"]
    rows = [asdict(overlap) for overlap in plan.overlaps]
    return [{"suite": suite, "task": row.pop("suite_task"), **row} for row in rows]


def _train(plan: "Plan") -> list[str]:
    """Train what has not been trained; says what could not be."""
    from harness.registry_actor import registry_actor
    from harness.train import train

    keeper = registry_actor(plan.config.registry, plan.base_fingerprint)
    workers = _trainers(plan)
    try:
        failures = train(plan.open_jobs, plan.folder, workers, keeper)
    finally:
        workers.close()
    return [f"expert {name}: {error}" for name, error in failures.items()]


def _measure_profiles(plan: "Plan", cluster: "Cluster") -> list[str]:
    """Measure the profiles that the pool lacks; says what could not be measured."""
    from harness.registry import Registry
    from harness.registry_actor import registry_actor
    from harness.train import measure_profiles

    registry = Registry(plan.config.registry, plan.base_fingerprint)
    experts, lacking = {}, []
    for job in plan.jobs:
        content_hash = registry.recorded(job.card.job)
        if content_hash is None or job.profile_id is None:
            continue
        if not registry.has_profile(content_hash, job.profile_id):
            experts[job.card.name] = content_hash
            lacking.append(job)
    if not lacking:
        return []
    cluster.connect()
    workers = _trainers(plan)
    keeper = registry_actor(plan.config.registry, plan.base_fingerprint)
    try:
        failures = measure_profiles(lacking, experts, workers, keeper)
    finally:
        workers.close()
    return [f"profile of {name}: {error}" for name, error in failures.items()]


def _trainers(plan: "Plan") -> "Workers":
    """Training actors, started when there is work."""
    import ray

    from harness.cluster import actor_count, actor_options
    from harness.jobs import Workers
    from harness.train_actor import TrainActor

    config = plan.config
    profile = config.profile if any(job.profile_id for job in plan.jobs) else None
    labels = config.cluster.train_nodes
    options = actor_options(config.cluster, labels)
    remote = ray.remote(TrainActor).options(**options, max_concurrency=2)
    return Workers(
        lambda: remote.remote(config.base, plan.base_fingerprint, profile, config.run.dir),
        lambda: actor_count(config.cluster, labels),
    )


def _evaluate(plan: "Plan", cluster: "Cluster") -> list[str]:
    """Evaluate every router that the pool can serve; says which ones it cannot."""
    import ray
    from tqdm import tqdm

    from harness.cluster import actor_count, actor_options
    from harness.eval_actor import EvalActor
    from harness.evaluate import Evaluation
    from harness.jobs import Workers
    from harness.pack import pool_id
    from harness.registry import Registry
    from harness.registry_actor import registry_actor
    from harness.serve import choose

    config, registry = plan.config, Registry(plan.config.registry, plan.base_fingerprint)
    experts = _pool(registry, plan)
    served = choose(plan, registry, experts)
    for problem in served.problems:
        print(problem, file=sys.stderr)

    @functools.cache  # one handle for the whole stage: an actor ends with its last one
    def keeper() -> Any:
        return registry_actor(config.registry, plan.base_fingerprint)

    def make() -> Any:
        options = actor_options(config.cluster, config.cluster.evaluate_nodes)
        remote = ray.remote(EvalActor).options(**options)
        return remote.remote(
            config.base,
            plan.base_fingerprint,
            config.registry,
            keeper(),
            experts,
            served.profiles,
            served.multitask,
            config.run.dir,
        )

    def count() -> int:
        cluster.connect()
        return actor_count(config.cluster, config.cluster.evaluate_nodes)

    workers = Workers(make, count)
    common = {
        "run": config.pool["name"],
        "base": config.base.name,
        "manifest": pool_id(experts),
    }
    total = plan.work.requests * len(served.routers)
    try:
        with tqdm(total=total, desc="evaluate", unit="request", disable=None) as bar:
            evaluation = Evaluation(
                plan.folder,
                config.suite["name"],
                plan.suite,
                common,
                config.base.dtype,
                list(experts),
                workers,
                config.chunk_characters,
                bar.update,
                served.identities,
            )
            rows = []
            for place, (name, router) in enumerate(served.routers.items()):
                if place == 1:
                    evaluation.ask_ahead(served.routers)
                rows += evaluation.run(name, router)
                evaluation.write_scores(rows)
            evaluation.write_scores(rows, derived=set(config.router))
    finally:
        workers.close()
    return served.problems


def _pool(registry: "Registry", plan: "Plan") -> dict[str, str]:
    """The trained experts' content hashes by name; says which ones are lacking."""
    found = {job.card.name: registry.finished(job.card.job) for job in plan.jobs}
    experts = {name: content for name, content in found.items() if content is not None}
    lacking = [name for name in found if name not in experts]
    if not experts:
        raise PhatgooseError(
            f"no expert of pool {plan.config.pool['name']} is in the registry {registry.folder}: "
            "run the stage train"
        )
    if lacking:
        print(f"the pool lacks {len(lacking)} experts: {', '.join(lacking)}", file=sys.stderr)
    return experts


def _record(config: RunConfig, plan: "Plan", started: float) -> dict[str, Any]:
    """What run.json says: what all calls have in common, and each call's own."""
    before = results.read_run(plan.folder) if plan.folder.exists(results.RUN_FILE) else {}
    call = {
        "configuration": asdict(config),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        },
        "overlaps": [str(overlap) for overlap in plan.overlaps],
        "started": _time(started),
        "finished": None,
    }
    return {"identity": plan.identity, "calls": [*before.get("calls", []), call]}


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _be_quiet() -> None:
    """Keep libraries from talking over the plan, the bars and the tables."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def help_text() -> str:
    """What --help prints."""
    listed = "\n".join(
        textwrap.fill(
            ", ".join(names), 98, initial_indent=f"  {group:8} ", subsequent_indent=" " * 11
        )
        for group, names in groups().items()
    )
    return f"""usage: python -m harness.run [group=choice ...] [key=value ...]

Train a pool of experts, evaluate routers over it on a suite of tasks, and report.

Groups and their choices (base= also takes a directory or a Hugging Face id,
router= a list, in it also single:<expert>):
{listed}

Keys are those of {CONF.name}/config.yaml and of the chosen files, for example:
  stages=[train]                only train
  run.dir=/data/run             where everything goes; an absolute path or a URI
  registry=/data/registry       where experts are kept
  train.lora.steps=100          steps of the LoRA stage
  suite.limit=200               documents per task
  router.phatgoose.top_k=1      experts per token

Started again with the same command, a run goes on where it was."""


if __name__ == "__main__":
    sys.exit(main())
