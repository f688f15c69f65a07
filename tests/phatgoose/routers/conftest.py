"""What tests of routers share: an encoder that is a function of the text."""

import pytest

from tests.support.pools import FakeEncoder


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    """Stands in for the profiles' encoder, and starts with nothing embedded."""
    fake = FakeEncoder()
    monkeypatch.setattr("phatgoose.sentence_encoder.load_encoder", lambda _: fake)
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._embedded", {})
    return fake
