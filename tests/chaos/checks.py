"""Check that a disturbed run has the results of an undisturbed one and leaves nothing behind."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness import run_folder
from harness.registry import Registry
from harness.registry.files import job_files, read_record
from harness.registry.verify import verify
from harness.storage import Folder
from tests.chaos.killer import Kill
from tests.chaos.watch import Watch

# Everything else must be bit-identical, row by row. Keys are files or folders of the run, values
# the columns that depend on time, place or the kills.
EXCLUDED = {
    run_folder.SCORES_FILE: {"run", "seconds"},  # a run is named after its folder
    run_folder.SUMMARY_FILE: set(),
    run_folder.OVERLAP_FILE: set(),
    run_folder.SAMPLES_FOLDER: set(),
    run_folder.ROUTING_FOLDER: set(),
    run_folder.TRAINING_FOLDER: {"seconds"},
    run_folder.JOBS_FILE: {
        "starts",
        "node",
        "address",
        "process",
        "seconds",
        "errors",
        "traceback",
    },
}
_SCHEMAS = {
    run_folder.SCORES_FILE: run_folder.SCORES,
    run_folder.SUMMARY_FILE: run_folder.SUMMARY,
    run_folder.OVERLAP_FILE: run_folder.OVERLAP,
    run_folder.SAMPLES_FOLDER: run_folder.SAMPLES,
    run_folder.ROUTING_FOLDER: run_folder.ROUTING,
    run_folder.TRAINING_FOLDER: run_folder.TRAINING,
    run_folder.JOBS_FILE: run_folder.JOBS,
}
_SHOWN = 3


def differences(run_dir: Path, undisturbed: Path) -> list[str]:
    """Return the differences between the results and registries of two runs, one per line."""
    found = []
    for name in EXCLUDED:
        ours, theirs = _files(run_dir, name), _files(undisturbed, name)
        if ours != theirs:
            found.append(f"{name}: {sorted(set(ours) ^ set(theirs))} exist in only one run")
        for file in sorted(set(ours) & set(theirs)):
            found += _compare(file, _rows(run_dir, file, name), _rows(undisturbed, file, name))
    if _records(run_dir) != _records(undisturbed):
        found.append("registry/jobs: records or content hashes differ")
    manifests = [_registry(folder).manifest().experts for folder in (run_dir, undisturbed)]
    if manifests[0] != manifests[1]:
        found.append("registry/manifests: the newest manifests name different experts")
    profiles = [_bytes(folder / "registry" / "profiles") for folder in (run_dir, undisturbed)]
    if profiles[0] != profiles[1]:
        found.append("registry/profiles: the content differs")
    return found


def faults(run_dir: Path, experts: Sequence[str]) -> list[str]:
    """Return the faults of a finished run by itself: duplicates, leftovers and damage."""
    found = []
    call = json.loads((run_dir / run_folder.RUN_FILE).read_text())["calls"][-1]
    if call["problems"] or not call["finished"]:
        found.append(f"run.json: the last call has problems: {call['problems']}")
    recorded = Counter(name for name, _ in _records(run_dir).values())
    if recorded != Counter(experts):
        found.append(f"registry/jobs: records per expert: {dict(recorded)}")
    registry = _registry(run_dir)
    manifest = registry.manifest().experts
    if sorted(manifest) != sorted(experts) or len({*manifest.values()}) != len(experts):
        found.append(f"the newest manifest does not name each expert once: {manifest}")
    check = verify(registry.folder, every_manifest=True)
    found += [f"registry: {problem}" for problem in check.problems]
    found += [f"registry: {orphan} is an orphan" for orphan in check.orphans]
    jobs = Counter((row["expert"], row["state"]) for row in _rows(run_dir, run_folder.JOBS_FILE))
    if jobs != Counter((name, "done") for name in experts):
        found.append(f"jobs.parquet: {dict(jobs)}")
    for file in _files(run_dir, run_folder.TRAINING_FOLDER):
        steps = Counter(
            (row["stage"], row["split"], row["step"])
            for row in _rows(run_dir, file, run_folder.TRAINING_FOLDER)
        )
        if twice := [key for key, count in steps.items() if count > 1]:
            found.append(f"{file}: duplicate rows: {twice[:_SHOWN]}")
    found += [f"leftover file: {path}" for path in _left(run_dir)]
    return found


def trained_again(watch: Watch, kills: Sequence[Kill]) -> tuple[int, list[str]]:
    """Return how many completed trainings were lost, and those that no kill explains.

    A result is lost if its actor, its node or the driver is killed after the last step and before
    the registry has it. Once the registry has it, no actor may be given the job again.
    """
    lost, found = 0, []
    causes = [k.seconds for k in kills if k.kind in ("trainer", "node", "driver", "registry")]
    for expert, recorded in watch.records.items():
        lines = [line for line in watch.lines if line.expert == expert]
        for before, after in itertools.pairwise(lines):
            if after.what != "training":
                continue
            if after.seconds > recorded:
                found.append(f"{expert} was assigned again after it was published")
            elif before.what == "trained":
                lost += 1
                # An event may be observed a moment late.
                if not any(before.seconds - 1 < second < after.seconds for second in causes):
                    found.append(f"{expert} was trained completely twice without a kill")
    return lost, found


def published_twice(output: str) -> list[str]:
    """Return the experts that the drivers of all calls report to have published twice."""
    said = Counter(
        line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("trained   ")
    )
    return [f"{expert} was published {n} times" for expert, n in said.items() if n > 1]


def _files(run_dir: Path, name: str) -> list[str]:
    if name.endswith(".parquet"):
        return [name] if (run_dir / name).exists() else []
    return sorted(f"{name}/{path.name}" for path in (run_dir / name).glob("*.parquet"))


def _rows(run_dir: Path, file: str, name: str | None = None) -> list[dict[str, Any]]:
    schema: pa.Schema = _SCHEMAS[name or file]
    rows: list[dict[str, Any]] = run_folder.read_table(Folder(run_dir), file, schema).to_pylist()
    return [{k: v for k, v in row.items() if k not in EXCLUDED[name or file]} for row in rows]


def _compare(file: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    if len(ours) != len(theirs):
        return [f"{file}: {len(ours)} rows, undisturbed {len(theirs)}"]
    # `repr` of a float is exact.
    rows = [i for i in range(len(ours)) if repr(ours[i]) != repr(theirs[i])]
    shown = [
        f"{file}, row {i}: {key}={ours[i][key]!r}, undisturbed {theirs[i][key]!r}"
        for i in rows[:_SHOWN]
        for key in ours[i]
        if repr(ours[i][key]) != repr(theirs[i][key])
    ]
    return shown + ([f"{file}: {len(rows)} rows differ"] if len(rows) > _SHOWN else [])


def _registry(run_dir: Path) -> Registry:
    return Registry.open(run_dir / "registry")


def _records(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Return the name and content hash of each job."""
    folder = Folder(run_dir / "registry")
    records = {file: read_record(folder, file) for file in job_files(folder)}
    return {file: (record.name, record.object) for file, record in records.items() if record}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def _left(run_dir: Path) -> list[str]:
    """Return checkpoints and files left by killed writers."""
    paths = [path.relative_to(run_dir) for path in sorted(run_dir.rglob("*"))]
    return [
        str(path)
        for path in paths
        if (path.name.startswith(".") and path.suffix != ".lock")  # empty and reused
        or path.suffix in (".tmp", ".partial")
        or (path.parts[0] == "checkpoints" and len(path.parts) > 1)
    ]
