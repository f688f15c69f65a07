"""Shared fixture of router tests: an encoder that is a function of the text."""

import pytest

from tests.support.pools import FakeEncoder


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    """Replace the profiles' encoder by a fake one that has embedded nothing yet."""
    fake = FakeEncoder()
    monkeypatch.setattr("phatgoose.sentence_encoder.load_encoder", lambda _: fake)
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._embedded", {})
    return fake
