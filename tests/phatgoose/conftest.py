"""The tiny bases, loaded anew for each test, since tests attach things to them."""

from pathlib import Path

import pytest

from phatgoose.base import Base, load_base


@pytest.fixture
def llama(llama_folder: Path) -> Base:
    """The tiny Llama-like base, in float32."""
    return load_base(str(llama_folder))


@pytest.fixture
def t5(t5_folder: Path) -> Base:
    """The tiny T5-like base, in float32."""
    return load_base(str(t5_folder))


@pytest.fixture(params=["llama", "t5"])
def base(request: pytest.FixtureRequest) -> Base:
    """Each of the tiny bases."""
    loaded: Base = request.getfixturevalue(request.param)
    return loaded
