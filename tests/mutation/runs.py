"""Run tests in forked processes, which start with all libraries imported.

The parent imports no module of the project, so that a child can import a changed one.
"""

import contextlib
import importlib.machinery
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

_NO_PLUGINS = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
_MEMORY = 16 * 2**30  # per run: a changed size must not use up the memory of the machine
# Modules that no mutant affects and that are slow to import.
LIBRARIES = (
    "torch", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5", "transformers.generation", "peft", "hypothesis", "numpy",
    "pyarrow", "pyarrow.parquet", "sklearn.cluster", "safetensors.torch", "lm_eval",
    "lm_eval.models.huggingface", "datasets", "ray", "pytest", "obstore",
)  # fmt: skip


class Killed(Exception):
    """Raised when a run takes too long."""


@dataclass
class Run:
    """One process that runs tests.

    Attributes:
        what: the caller's description.
        pid: the process.
        folder: the folder in which it writes.
        deadline: on the monotonic clock.
    """

    what: Any
    pid: int
    folder: Path
    deadline: float

    def status(self) -> int | None:
        """Return the exit status; None while it runs. Raise Killed after the deadline."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            _kill_group(self.pid)  # processes that the tests left running
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > self.deadline:
            _kill_group(self.pid)
            os.waitpid(self.pid, 0)
            raise Killed
        return None

    def result(self) -> Any:
        """Return the data that the run wrote, or None; remove its folder."""
        file = self.folder / "result.json"
        found = json.loads(file.read_text()) if file.exists() else None
        shutil.rmtree(self.folder, ignore_errors=True)
        return found


def start(what: Any, work: Callable[[Path], int], folder: Path, seconds: float) -> Run:
    """Run `work` in a child process with its own folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            _prepare(folder)
            status = work(folder)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return Run(what, pid, folder, time.monotonic() + seconds)


def run_tests(tests: Sequence[str], folder: Path, plugin: object, *options: str) -> int:
    """Run tests with pytest in this process; return its exit status."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "mutation",
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # a failure need not be minimized
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutation")
    return int(
        pytest.main(
            [
                *("-q", "--no-header", "--tb=no", "-m", "not slow", f"--basetemp={folder / 'tmp'}"),
                # They collect garbage, write, or belong to libraries.
                *(part for name in _NO_PLUGINS for part in ("-p", f"no:{name}")),
                *options,
                *tests,
            ],
            plugins=[plugin],
        )
    )


class FirstFailure:
    """A pytest plugin that records which test failed first."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "result.json"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the name of a test that failed."""
        if report.failed and not self._file.exists():
            self._file.write_text(json.dumps(report.nodeid))


def install(sources: Mapping[str, str]) -> None:
    """Import files with other contents; `sources` maps absolute paths to text."""
    loader = importlib.machinery.SourceFileLoader
    get_code = loader.get_code

    def changed(self: Any, fullname: str) -> CodeType | None:
        source = sources.get(self.get_filename(fullname))
        if source is None:
            return get_code(self, fullname)
        return compile(source, self.get_filename(fullname), "exec", dont_inherit=True)

    loader.get_code = changed  # type: ignore[method-assign]


def _prepare(folder: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
