"""Record which tests run which lines, and how long they take, in one run of all fast tests."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.mutants import Mutant
from tests.mutation.runs import run_tests

# Tests that take longer are not run for mutants.
LONGEST_TEST = 2.5
# The maximum time of the tests of one mutant, in seconds.
MOST_SECONDS = 45.0


@dataclass(frozen=True)
class Covered:
    """The result of a run of all tests.

    Attributes:
        seconds: of each test.
        lines: by file and line, the tests that run it.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]

    def tests_of(self, mutant: Mutant, killers: Sequence[str] = ()) -> list[str]:
        """Return the tests that may notice a mutant, the likeliest first.

        Args:
            mutant: the mutant.
            killers: tests that have noticed others of the same function, the latest last.
        """
        by_line = self.lines.get(mutant.path, {})
        found: set[str] = {test for line in mutant.lines for test in by_line.get(line, ())}
        if not found:
            # For a default, a constant or a field: tests of the function, or else of the module.
            found = {test for line in mutant.function or () for test in by_line.get(line, ())}
        if not found:
            found = {test for tests in by_line.values() for test in tests}
        mirror = Path(mutant.path).stem
        recent = {test: -place for place, test in enumerate(killers)}

        def order(test: str) -> tuple[Any, ...]:
            named = mirror in Path(test.partition("::")[0]).stem
            return (recent.get(test, 1), not named, self.seconds[test], test)

        able = sorted((t for t in found if self.seconds[t] <= LONGEST_TEST), key=order)
        chosen: list[str] = []
        room = MOST_SECONDS
        for test in able:
            room -= self.seconds[test]
            if room < 0:
                break
            chosen.append(test)
        return chosen


def measure(tests: Sequence[str], sources: Sequence[str], folder: Path) -> int:
    """Run all tests and write the file for `read`; return pytest's exit status."""
    import coverage

    measured = coverage.Coverage(data_file=None, include=[f"*/{s}" for s in sources])
    timer = _Timer(measured)
    measured.start()
    status = run_tests(tests, folder, timer)
    measured.stop()
    data = measured.get_data()
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        (source,) = (source for source in sources if file.endswith(f"/{source}"))
        contexts = data.contexts_by_lineno(file)
        lines[source] = {line: sorted(filter(None, tests)) for line, tests in contexts.items()}
    (folder / "result.json").write_text(
        json.dumps({"seconds": timer.seconds, "lines": lines, "failed": timer.failed})
    )
    return status


def read(found: Any) -> Covered:
    """Read the file written by `measure`."""
    lines = {
        source: {int(line): tests for line, tests in by_line.items()}
        for source, by_line in found["lines"].items()
    }
    return Covered(defaultdict(float, found["seconds"]), lines)


class _Timer:
    """Tell coverage which test runs, and record the time of each test."""

    def __init__(self, measured: Any) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self._measured = measured

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run one test with its fixtures in a separate coverage context."""
        self._measured.switch_context(item.nodeid)
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = round(time.monotonic() - started, 3)
            self._measured.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the names of tests that fail without a mutant."""
        if report.failed:
            self.failed.append(report.nodeid)
