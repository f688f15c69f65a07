import pickle
from pathlib import Path

import pytest

from phatgoose.errors import (
    Diverged,
    OutOfMemory,
    PhatgooseError,
    check_known,
    did_you_mean,
    listed,
    near_names,
    reason_of,
)


@pytest.mark.parametrize("kind", [PhatgooseError, Diverged, OutOfMemory])
@pytest.mark.parametrize("mark", ["\n", "\r\n", "\r", "\x0b", "\u2028"])
def test_an_error_is_one_line_even_if_it_quotes_several(
    kind: type[PhatgooseError], mark: str
) -> None:
    error = kind(f"column {mark}a{mark}b: there is none")
    assert str(error).splitlines() == ["column  a b: there is none"]
    # Actors send it to the driver.
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("operatos", ["operators"]),
        ("task-3", ["task-2", "task-1"]),
        ("plural", ["linguistic/plural"]),  # part of a name is enough
        ("xyz", []),
        ("", []),
    ],
)
def test_near_names_are_suggested(wanted: str, near: list[str]) -> None:
    names = ["task-1", "operators", "task-2", "operators", "linguistic/plural"]
    assert near_names(wanted, iter(names)) == near
    hint = f"did you mean {' or '.join(near)}?" if near else ""
    assert did_you_mean(wanted, names) == hint


def test_at_most_three_near_names_are_suggested() -> None:
    names = [f"task-{number}" for number in range(9)]
    assert len(near_names("task", names)) == len(near_names("ask", names)) == 3
    assert near_names("q", ["ab", "cd"]) == []
    assert len(near_names("q", ["ab", "cd"], cutoff=0.0)) == 2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (1, "a"),
        (2, "a, b"),
        (3, "a, b and 1 more"),
        (5, "a, b and 3 more"),
    ],
)
def test_the_first_names_are_listed(count: int, text: str) -> None:
    assert listed("abcde"[:count], most=2) == text
    assert listed("abcde"[:count]) == ", ".join("abcde"[:count])
    assert listed("abcdef") == "a, b, c, d, e and 1 more"


@pytest.mark.parametrize(
    ("name", "names", "hint"),
    [
        ("operatos", ["operators", "x"], "did you mean operators?"),
        ("sngle:plural", ["single"], "did you mean single?"),
        ("z", ["ab", "cd"], "available: ab, cd"),
        (3, ["3"], "did you mean 3?"),  # a number is not a name
        (None, [], "available: none"),
    ],
)
def test_an_unknown_name_is_refused_with_similar_ones(
    name: object, names: list[str], hint: str
) -> None:
    with pytest.raises(PhatgooseError) as refused:
        check_known(name, iter(names), "x: no such thing")
    assert str(refused.value) == f"x: no such thing; {hint}"
    for known in names:
        check_known(known, iter(names), "x: no such thing")


def test_an_error_reason_is_short_and_on_one_line() -> None:
    dump = ValueError(" no such key\n\n  full_key: a.b ")
    assert reason_of(dump) == "no such key full_key: a.b"
    assert reason_of(dump, first_line=True) == "no such key"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(ValueError("\n"), first_line=True) == "ValueError"
    assert reason_of(RuntimeError("long " * 1000)) == ("long " * 1000)[:300]
    own = PhatgooseError("long " * 1000)
    assert reason_of(own) == str(own)  # another PhatgooseError is quoted in full


def test_an_os_error_reason_contains_neither_errno_nor_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing") as caught:
        (tmp_path / "missing").read_bytes()
    assert reason_of(caught.value) == "No such file or directory"
    assert reason_of(OSError("path too long")) == "path too long"
    # A resolver's errors have their own numbers.
    assert reason_of(OSError(-3, "name resolution failed")) == "name resolution failed"
