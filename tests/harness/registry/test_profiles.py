from pathlib import Path

import pytest
import torch

from harness.registry import Registry
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.profile import Profile
from tests.support.pools import make_profiles
from tests.support.tiny import make_experts

ID = "0123456789abcdef"


def test_a_profile_is_stored_beside_its_expert(tmp_path: Path, llama: Base) -> None:
    experts = make_experts(llama, 2)
    registry = Registry(tmp_path, llama.fingerprint)
    profile = make_profiles(experts)[0]
    content_hash = experts[0].content_hash()
    assert not registry.has_profile(content_hash, ID)
    registry.put_profile(content_hash, ID, profile.to_bytes())
    assert registry.has_profile(content_hash, ID)
    assert not registry.has_profile(content_hash, ID[::-1])  # measured in another way
    assert not registry.has_profile(experts[1].content_hash(), ID)
    mapped = registry.profile(content_hash, ID)
    read = Profile.from_bytes(profile.to_bytes(), "memory")
    for again in (mapped, read):
        assert torch.equal(again.embeddings_NS, profile.embeddings_NS)
        assert again.mean_activation.keys() == profile.mean_activation.keys()
        for name, mean_D in profile.mean_activation.items():
            assert torch.equal(again.mean_activation[name], mean_D)
        assert again.description == profile.description


def test_an_existing_profile_is_kept(tmp_path: Path, llama: Base) -> None:
    experts = make_experts(llama, 1)
    first, second = make_profiles(experts, seed=0)[0], make_profiles(experts, seed=1)[0]
    registry, content_hash = Registry(tmp_path, llama.fingerprint), experts[0].content_hash()
    registry.put_profile(content_hash, ID, first.to_bytes())
    registry.put_profile(content_hash, ID, second.to_bytes())
    assert torch.equal(registry.profile(content_hash, ID).embeddings_NS, first.embeddings_NS)


def test_names_are_checked_and_damage_is_named(tmp_path: Path, llama: Base) -> None:
    registry = Registry(tmp_path, llama.fingerprint)
    content_hash = make_experts(llama, 1)[0].content_hash()
    for wrong in ("../../x", "", "A" * 16, "0" * 7):
        with pytest.raises(PhatgooseError, match="not a profile id"):
            registry.has_profile(content_hash, wrong)
    with pytest.raises(PhatgooseError, match="not a content hash"):
        registry.has_profile("../x", ID)
    registry.put_profile(content_hash, ID, b"not a profile")
    with pytest.raises(PhatgooseError, match=rf"profiles/{content_hash}-{ID}.*measures it again"):
        registry.profile(content_hash, ID)
