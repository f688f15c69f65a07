import time
from pathlib import Path

import pytest

from tests.mutation.covered import MOST_SECONDS, Covered
from tests.mutation.mutants import Mutant, Mutants
from tests.mutation.runs import Killed, Run, start

SOURCE = '''"""A module."""

import torch

__all__ = ["f"]
LIMIT = 3


class Box:
    """A class."""

    size: int = 5

    @property
    def half(self) -> int | None:
        """A decorated method."""
        return self.size // 2


def f(x: "list[int]", *, wide: bool = True) -> int:
    """A function."""
    if len(x) + 7 > LIMIT:
        raise ValueError("too many words", 11)
    torch.manual_seed(0)
    return min(x)
'''


@pytest.fixture
def mutants(tmp_path: Path) -> list[Mutant]:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = Mutants(str(path))
    return [found[i] for i in range(len(found))]


def added(mutants: list[Mutant]) -> list[str]:
    lines = SOURCE.splitlines()
    return [
        line.strip()
        for m in mutants
        for line in m.source.splitlines()
        if line not in lines
    ]  # fmt: skip


def test_each_mutant_changes_one_statement_and_compiles(mutants: list[Mutant]) -> None:
    sources = [mutant.source for mutant in mutants]
    assert len(set(sources)) == len(sources)
    before = SOURCE.splitlines()
    for mutant in mutants:
        compile(mutant.source, "module", "exec")
        after = mutant.source.splitlines()
        assert len(after) == len(before)
        changed = [
            i for i, pair in enumerate(zip(before, after, strict=True), 1) if len(set(pair)) > 1
        ]
        assert len(changed) == 1
        assert changed[0] in mutant.lines


def test_constants_fields_defaults_and_decorated_functions_are_mutated(
    mutants: list[Mutant],
) -> None:
    lines = added(mutants)
    for line in (
        "LIMIT = 4",
        "size: int = 4",
        "return self.size / 2",
        'def f(x: "list[int]", *, wide: bool = False) -> int:',
        "if len(x) + 7 >= LIMIT:",
        "if True:",
        'raise ValueError("too many words", 12)',
        "pass",
        "return max(x)",
    ):
        assert line in lines


def test_code_without_behavior_is_not_mutated(mutants: list[Mutant]) -> None:
    lines = added(mutants)
    for words in ("XX", "TOO MANY", "int & None", "torch(", "len(None)"):
        assert not any(words in line for line in lines), words
    assert not any("__all__" in line for line in lines)


def test_a_mutant_runs_the_tests_that_cover_its_lines() -> None:
    names = ["tests/test_other.py::a", "tests/test_module.py::b", "tests/test_other.py::c"]
    seconds = dict(zip(names, (0.1, 0.2, 0.3), strict=True))
    seconds |= {"tests/test_other.py::slow": 60.0}
    covered = Covered(seconds, {"x/module.py": {3: names, 4: [*seconds], 9: names[:1]}})

    def tests_of(first: int, function: range | None = None, *killers: str) -> list[str]:
        mutant = Mutant("x/module.py", 0, "", range(first, first + 1), function)
        return covered.tests_of(mutant, killers)

    assert tests_of(9) == names[:1]
    assert tests_of(3) == [names[1], names[0], names[2]]  # the module's own, then the fast ones
    assert tests_of(4) == tests_of(3)  # without the slow one
    assert tests_of(4, None, names[0], names[2]) == [names[2], names[0], names[1]]
    assert tests_of(1, range(8, 10)) == names[:1]  # a default: tests that run the function
    assert tests_of(1) == tests_of(3)  # a constant: tests that run the module


def test_the_tests_of_one_mutant_are_limited() -> None:
    seconds = {f"tests/test_other.py::{i}": 2.0 for i in range(100)}
    covered = Covered(seconds, {"x/module.py": {3: [*seconds]}})
    chosen = covered.tests_of(Mutant("x/module.py", 0, "", range(3, 4), None))
    assert 2.0 * len(chosen) == MOST_SECONDS - MOST_SECONDS % 2


def status_of(run: Run) -> int:
    while (status := run.status()) is None:
        time.sleep(0.01)
    return status


def _sleep(folder: Path) -> int:
    time.sleep(60)
    return 0


def test_a_run_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    run = start("forever", _sleep, tmp_path / "run", 0.2)
    with pytest.raises(Killed):
        status_of(run)


def test_a_run_returns_its_status_and_its_result(tmp_path: Path) -> None:
    def work(folder: Path) -> int:
        (folder / "result.json").write_text('"a"')
        return 3

    run = start("short", work, tmp_path / "run", 60)
    assert (status_of(run), run.result()) == (3, "a")
    assert not (tmp_path / "run").exists()
