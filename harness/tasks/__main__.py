"""Command line for tasks: `python -m harness.tasks list|show|check|prepare|export <overrides>`.

Overrides are the same as for harness.run: pool=flan, suite=bbh, pool.folder=/data/hub.
"""

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.command_line import Output, count, run_command, table
from harness.config.load import CONF, load_config
from harness.config.schema import RunConfig
from harness.tasks import (
    TaskData,
    TaskSpec,
    describe,
    folder_of,
    list_names,
    prepare_all,
    task_specs,
    unreachable,
)
from harness.tasks.lm_eval_export import write_for_lm_eval
from harness.tasks.spec import one_of
from harness.tasks.store import is_written, read_records
from phatgoose.errors import PhatgooseError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return run_command(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.tasks", description="Inspect the tasks of pools and suites."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, call: Callable[[Any], Output], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(call=call)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        return sub

    command("list", _list, "list the available pools and suites")
    show = command("show", _show, "show a task and some of its examples as a model sees them")
    show.add_argument("task", help="name of the task")
    show.add_argument("--examples", type=int, default=2, help="number of examples")
    check = command("check", _check, "report for each task whether its data is available")
    prepare = command("prepare", _prepare, "fetch and prepare data ahead of a run")
    export = command(
        "export", _export, "write BIG-bench tasks as data for lm-eval's packaged definitions"
    )
    export.add_argument("folder", help="folder to write to; created if missing")
    for sub in (show, check, prepare, export):
        sub.add_argument("overrides", nargs="*", help="as for harness.run: pool=flan suite=bbh")
    return parser


def _list(args: argparse.Namespace) -> Output:
    document: dict[str, Any] = {"lists": list_names()}
    rows = []
    for group in ("pool", "suite"):
        for path in sorted((CONF / group).glob("*.yaml")):
            about = _first_sentence(path.read_text())
            tasks = _tasks_of(yaml.safe_load(path.read_text()))
            document[f"{group}={path.stem}"] = {"tasks": tasks, "about": about}
            rows.append([f"{group}={path.stem}", "" if tasks is None else str(tasks), about])
    return Output(document, table(["", "tasks", "about"], rows, right={1}))


def _tasks_of(group: dict[str, Any]) -> int | None:
    """Return the number of tasks in a pool or suite; None if it depends on the user's options."""
    try:
        return None if group.get("of_pool") else len(task_specs(group))
    except PhatgooseError:
        return None


def _first_sentence(text: str) -> str:
    comment = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return textwrap.shorten(
        " ".join(comment).partition(". ")[0].rstrip("."), 90, placeholder=" ..."
    )


def _show(args: argparse.Namespace) -> Output:
    specs = {spec.name: spec for spec in _chosen(args.overrides)}
    one_of(args.task, specs, "the chosen pool and suite")
    (data,) = prepare_all([specs[args.task]])
    records = [r for split in (data.evaluation, data.train) for r in read_records(split, 1000)]
    shown = records[: args.examples]
    lines = [
        f"{data.name}: {describe(data)}",
        f"{data.kind}, {count(data.counts['train'], 'training example')}, "
        f"{data.counts['evaluation']:,} for evaluation, in {data.evaluation.parent}",
        *(f"{key}: {value}" for key, value in (data.origin or {}).items() if value),
    ]
    for record in shown:
        lines += ["-" * 80, record.input.rstrip(" ") + "▁" * record.input.endswith(" ")]
        lines += [f"  → {target!r}" for target in record.targets]
        lines += [f"  or {c!r}" for i, c in enumerate(record.choices) if i not in record.correct]
    document = {**_described(data), "examples": [vars(record) for record in shown]}
    return Output(document, "\n".join(lines))


def _check(args: argparse.Namespace) -> Output:
    specs = _chosen(args.overrides)
    problems = unreachable(specs)
    states = {spec.name: _state(spec, problems) for spec in specs}
    rows = [
        [spec.name, states[spec.name], spec.source, textwrap.shorten(", ".join(spec.members), 70)]
        for spec in specs
    ]
    text = table(["task", "data", "source", "members"], rows, right=set())
    good = len(specs) - len(problems)
    document = {"tasks": states, "problems": problems, "reachable": good, "of": len(specs)}
    summary = f"{good} of {count(len(specs), 'task')} available"
    for problem in list(problems.values())[:1]:
        summary += f"; {problem}"
    return Output(document, f"{text}\n{summary}", 1 if problems else 0)


def _state(spec: TaskSpec, problems: dict[str, str]) -> str:
    if spec.name in problems:
        return "missing"
    if not spec.has_data:
        return "an expert without data"
    return "prepared" if is_written(folder_of(spec)) else "reachable"


def _prepare(args: argparse.Namespace) -> Output:
    from harness.driver.prepare import preparer
    from harness.scheduling.cluster import Cluster

    started = time.monotonic()
    with Cluster() as cluster:
        data = prepare_all(_chosen(args.overrides), preparer(cluster))
    seconds = time.monotonic() - started
    rows = [[d.name, d.kind, f"{d.counts['train']:,}", f"{d.counts['evaluation']:,}"] for d in data]
    total = sum(sum(d.counts.values()) for d in data)
    text = table(["task", "kind", "train", "evaluation"], rows, right={2, 3})
    document = {"tasks": [_described(d) for d in data], "seconds": round(seconds, 1)}
    return Output(document, f"{text}\n{count(total, 'example')} in {seconds:.0f} s")


def _export(args: argparse.Namespace) -> Output:
    specs = [spec for spec in _chosen(args.overrides) if spec.source in ("bigbench", "bbh")]
    suite = write_for_lm_eval(prepare_all(specs), Path(args.folder))
    return Output(suite, yaml.safe_dump(suite, sort_keys=False))


def _described(data: TaskData) -> dict[str, Any]:
    return {
        "task": data.name,
        "kind": data.kind,
        "counts": data.counts,
        "fingerprint": data.fingerprint,
        "folder": str(data.evaluation.parent),
        "origin": dict(data.origin or {}),
    }


def _chosen(overrides: list[str]) -> list[TaskSpec]:
    """Return the tasks of the groups named in the overrides, or of pool and suite if none is."""
    config: RunConfig = load_config(overrides)
    groups = {override.lstrip("+~").partition("=")[0].partition(".")[0] for override in overrides}
    pool = config.pool_tasks() if "pool" in groups or "suite" not in groups else []
    suites = config.suites if "suite" in groups or "pool" not in groups else []
    tasks = [spec for suite in suites for spec in config.suite_tasks(suite)]
    return [*{spec.name: spec for spec in [*tasks, *pool]}.values()]


if __name__ == "__main__":
    sys.exit(main())
