"""Run the complete benchmark with one command: `python -m harness.run pool=demo`.

A run plans and checks, trains missing experts, evaluates missing answers, and writes a report.
"""

import contextlib
import logging
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from harness import run_folder
from harness.command_line import one_line_errors
from harness.config.load import CONF, group_choices, load_config
from harness.config.schema import RunConfig
from harness.logs import log_to_terminal
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

if TYPE_CHECKING:
    from harness.planning.plan import Plan

_LOG = logging.getLogger(__name__)
_PACKAGES = ("phatgoose", "torch", "transformers", "ray", "deepspeed", "lm_eval", "pyarrow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    log_to_terminal()
    try:
        with one_line_errors():
            run(load_config(arguments))
    except PhatgooseError as error:
        _LOG.error("%s", error)
        return 2
    except KeyboardInterrupt:
        _LOG.warning("\nstopped; run the same command to resume")
        return 130
    return 0


def run(config: RunConfig) -> None:
    """Run all stages of a configuration.

    Raises:
        PhatgooseError: a check before the work failed, or no expert is available. Also raised after
            all other work is done if some experts, profiles or routers failed.
    """
    log_to_terminal()
    _be_quiet()
    # Imported here, so that a mistyped configuration is rejected immediately.
    from harness.driver.lease import RunLease
    from harness.driver.prepare import comparer, prepare_run, preparer
    from harness.driver.stages import Driver
    from harness.planning.plan import make_plan
    from harness.reporting.report import make_report
    from harness.scheduling.cluster import Cluster
    from harness.storage.cleanup import remove_left_over
    from phatgoose.routers.interface import needs_profiles

    if config.stages == ["report"] and not Folder(config.run.dir).exists(run_folder.RUN_FILE):
        raise PhatgooseError(
            f"run.dir={config.run.dir}: there is no run to report. Run the stages train and "
            "evaluate first."
        )
    started = time.monotonic()
    problems: list[str] = []
    with RunLease(Folder(config.run.dir)) as lease, Cluster() as cluster:
        device = cluster.device(config.cluster) if "evaluate" in config.stages else "cpu"
        prepared = prepare_run(config, preparer(cluster), comparer(cluster))
        plan = make_plan(config, prepared, device)
        print(plan.describe(), flush=True)
        driver = Driver(plan, cluster)
        to_train = "train" in config.stages and bool(plan.open_jobs)
        if to_train:
            driver.check()
        lease.take()
        record = _record(config, plan)
        for inputs in plan.inputs.values():
            inputs.requests.check(plan.folder)
        run_folder.write_run(plan.folder, record)
        run_folder.write_table(
            plan.folder, run_folder.OVERLAP_FILE, run_folder.OVERLAP, _overlaps(plan)
        )
        if "train" in config.stages:
            driver.table.save(now=True)
            driver.finish_earlier_jobs()
        try:
            if to_train:
                problems += driver.train()
            if "evaluate" in config.stages:
                if needs_profiles(plan.routers.values()):
                    problems += driver.measure_profiles()
                problems += driver.evaluate()
        except PhatgooseError as error:
            problems.append(str(error))  # after its causes, if any
            # The disk may be full: report the first error.
            with contextlib.suppress(PhatgooseError):
                _end(plan, record, problems, started)
            raise PhatgooseError("; ".join(problems)) from error
        finally:
            driver.close()
            for folder in (plan.folder, Folder(config.registry)):
                remove_left_over(folder)
        minutes = _end(plan, record, problems, started)
        if "report" in config.stages:
            print("\n" + make_report(plan.folder), end="")
        print(f"done in {minutes:.1f} min; all files are in {plan.folder}")
        if problems:
            raise PhatgooseError(
                f"problems: {len(problems)} ({'; '.join(problems)}). Run the same command to retry."
            )


def _end(plan: "Plan", record: dict[str, Any], problems: list[str], started: float) -> float:
    """Record how this call ended in run.json, and return the minutes it took."""
    minutes = (time.monotonic() - started) / 60
    record["calls"][-1] |= {
        "finished": _now(),
        "minutes": round(minutes, 2),
        "problems": problems,
    }
    run_folder.write_run(plan.folder, record)
    return minutes


def _overlaps(plan: "Plan") -> list[dict[str, Any]]:
    """Return the rows of overlap.parquet."""
    rows = [(suite, asdict(o)) for suite, found in plan.overlaps.items() for o in found]
    return [{"suite": suite, "task": row.pop("suite_task"), **row} for suite, row in rows]


def _record(config: RunConfig, plan: "Plan") -> dict[str, Any]:
    """Return the content of run.json: facts shared by all calls, and a record of each call."""
    from harness.scheduling.hardware import memory_gib, processor, usable_cores  # slow to import

    before = run_folder.read_run(plan.folder) if plan.folder.exists(run_folder.RUN_FILE) else {}
    configuration = asdict(config)
    # A URI may contain a secret key; this form does not.
    configuration["run"]["dir"] = str(plan.folder)
    configuration["registry"] = str(Folder(config.registry))
    call = {
        "configuration": configuration,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "hardware": {
            "processor": processor(),
            "cores": usable_cores(),
            "memory_gib": memory_gib(),
        },
        "overlaps": [str(overlap) for found in plan.overlaps.values() for overlap in found],
        "started": _now(),
        "finished": None,
    }
    return {"identity": plan.identity, "calls": [*before.get("calls", []), call]}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _be_quiet() -> None:
    """Silence library output that would clutter the plan, the progress bars and the tables."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def help_text() -> str:
    """Return the text that --help prints."""
    listed = "\n".join(
        textwrap.fill(
            ", ".join(names), 98, initial_indent=f"  {group:8} ", subsequent_indent=" " * 11
        )
        for group, names in group_choices().items()
    )
    return f"""usage: python -m harness.run [group=choice ...] [key=value ...]

Train a pool of experts, evaluate routers over it on a suite of tasks, and write a report.

Groups and their choices (base= also takes a directory or a Hugging Face id;
router= takes a list; entries may be single:<expert>):
{listed}

Keys are those of {CONF.name}/config.yaml and of the chosen files, for example:
  stages=[train]                only train
  run.dir=/data/run             output folder; an absolute path or a URI
  registry=/data/registry       where experts are stored
  train.lora.steps=100          steps of the LoRA stage
  suite.limit=200               documents per task
  router.phatgoose.top_k=1      experts per token

Run the same command again to resume a run."""


if __name__ == "__main__":
    sys.exit(main())
