from pathlib import Path

import pytest
import ray

from harness.registry import Registry
from harness.registry.actor import registry_actor
from harness.registry.files import Manifest
from phatgoose.errors import PhatgooseError
from tests.support.registries import BASE, OTHER_BASE, make_expert


@pytest.mark.slow
def test_the_actor_survives_being_killed(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    actor = registry_actor("pool", BASE)
    content_hash = ray.get(actor.publish.remote(make_expert(1)))
    ray.kill(actor, no_restart=False)

    monkeypatch.chdir("/")  # a relative path is relative to the driver's directory
    assert ray.get(actor.publish.remote(make_expert(1))) == content_hash
    assert ray.get(actor.finished.remote(make_expert(1).card.job)) == content_hash
    assert ray.get(actor.manifest.remote()) == Manifest(1, 0, BASE, {"task-1": content_hash})
    assert Registry(tmp_path / "pool", BASE).load(content_hash).card.name == "task-1"

    with pytest.raises(PhatgooseError, match="no experts zebra"):
        ray.get(actor.find.remote("zebra"))
    with pytest.raises(PhatgooseError, match="choose another folder"):
        registry_actor(tmp_path / "pool", OTHER_BASE)
