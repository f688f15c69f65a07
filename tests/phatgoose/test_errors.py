import pickle

import pytest

from phatgoose.errors import Diverged, OutOfMemory, PhatgooseError


@pytest.mark.parametrize("kind", [PhatgooseError, Diverged, OutOfMemory])
@pytest.mark.parametrize("mark", ["\n", "\r\n", "\r", "\x0b", "\u2028"])
def test_an_error_is_one_line_whatever_it_quotes(kind: type[PhatgooseError], mark: str) -> None:
    error = kind(f"column {mark}a{mark}b: there is none")
    assert str(error).splitlines() == ["column  a b: there is none"]
    # Actors send it to the driver.
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
