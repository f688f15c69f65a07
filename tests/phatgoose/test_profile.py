import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.pool import Pool
from phatgoose.profile import Profile, ProfileConfig
from phatgoose.routers.stacked_profiles import embeddings, mean_activations, norms
from tests.support.pools import ABSENT, make_profiles, make_uneven_experts, pool_of


@pytest.fixture
def profile(llama: Base) -> Profile:
    (profile, *_) = make_profiles(make_uneven_experts(llama))
    return dataclasses.replace(profile, description='naïve "quotes"\nand a second line ☃ {}')


def test_a_saved_profile_loads_unchanged(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "a.profile"
    file.write_bytes(profile.to_bytes())
    for path in (file, str(file)):
        loaded = Profile.load(path)
        for field in ("encoder", "encoder_fingerprint", "description"):
            assert getattr(loaded, field) == getattr(profile, field)
        assert torch.equal(loaded.embeddings_NS, profile.embeddings_NS)
        for field in ("mean_activation", "norms"):
            mine, theirs = getattr(loaded, field), getattr(profile, field)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
            assert all(tensor.dtype == torch.float32 for tensor in mine.values())


def test_a_profile_is_saved_with_the_same_bytes(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "a.profile"
    file.write_bytes(profile.to_bytes())
    assert profile.to_bytes() == Profile.load(file).to_bytes()


def test_a_profile_may_be_saved_from_a_view(profile: Profile, tmp_path: Path) -> None:
    rows_NS = torch.arange(12.0).view(3, 4)
    file = tmp_path / "a.profile"
    file.write_bytes(dataclasses.replace(profile, embeddings_NS=rows_NS.T).to_bytes())
    assert torch.equal(Profile.load(file).embeddings_NS, rows_NS.T)


def resaved(data: Path, texts: Any, *, drop: str = "") -> bytes:
    """Return the file with other metadata, or without a tensor."""
    tensors = {name: tensor for name, tensor in load_file(data).items() if name != drop}
    return save(tensors, metadata=texts)


def texts_of(data: Path) -> dict[str, str]:
    with safe_open(data, framework="pt") as file:
        texts: dict[str, str] = json.loads(file.metadata()["profile"])
    return texts


DAMAGES: dict[str, Callable[[Path], bytes]] = {
    "nothing": lambda _: b"",
    "cut": lambda file: file.read_bytes()[:-5],
    "cut in the header": lambda file: file.read_bytes()[:40],
    "longer": lambda file: file.read_bytes() + b"x",
    "no safetensors": lambda _: b"a text that somebody put there, of some length",
    "no metadata": lambda file: resaved(file, None),
    "other metadata": lambda file: resaved(file, {"format": "pt"}),
    "metadata that is no JSON": lambda file: resaved(file, {"profile": "{"}),
    "metadata that is no object": lambda file: resaved(file, {"profile": "[1]"}),
    "a text too few": lambda file: resaved(file, {"profile": '{"encoder": "e"}'}),
    "a text too many": lambda file: resaved(
        file, {"profile": json.dumps({**texts_of(file), "more": "x"})}
    ),
    "no embeddings": lambda file: resaved(
        file, {"profile": json.dumps(texts_of(file))}, drop="embeddings"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_fix(
    profile: Profile, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "a.profile"
    file.write_bytes(profile.to_bytes())
    damaged = DAMAGES[damage](file)
    file.unlink()
    file.write_bytes(damaged)
    with pytest.raises(
        PhatgooseError, match=r"a\.profile is not a complete profile \(.*: delete it"
    ) as e:
        Profile.load(file)
    assert "\n" not in str(e.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(PhatgooseError, match=f"{path.name} is not a complete profile"):
            Profile.load(path)


@pytest.mark.parametrize(
    "name", ["embedded_examples", "activation_examples", "max_input_tokens", "max_target_tokens"]
)
def test_a_configuration_that_measures_nothing_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(PhatgooseError, match=f"profile.{name} is 0: it must be at least 1"):
        ProfileConfig(**options)


def test_a_pool_has_a_profile_for_each_expert(llama: Base) -> None:
    experts = make_uneven_experts(llama, 3)
    pool, profiles = Pool.from_experts(experts), make_profiles(experts)
    assert pool.profiles is None
    assert pool.with_profiles(profiles).profiles == tuple(profiles)
    with pytest.raises(PhatgooseError, match="2 profiles for 3 experts"):
        pool.with_profiles(profiles[:2])
    other = dataclasses.replace(profiles[1], encoder_fingerprint="other")
    with pytest.raises(PhatgooseError, match="different encoders"):
        pool.with_profiles([profiles[0], other, profiles[2]])


def test_router_inputs_follow_the_order_of_the_pool(base: Base) -> None:
    pool = pool_of(make_uneven_experts(base))
    assert pool.profiles is not None
    for name, factors in pool.linears.items():
        mean_ED, (mean_E, std_E) = mean_activations(pool, name), norms(pool, name)
        assert mean_ED.shape == factors.lora_A_ERD[:, 0].shape
        assert mean_E.shape == std_E.shape == (5,)
        for index, (expert, profile) in enumerate(zip(pool.experts, pool.profiles, strict=True)):
            if name in profile.mean_activation:
                assert torch.equal(mean_ED[index], profile.mean_activation[name])
                assert [mean_E[index], std_E[index]] == profile.norms[name].tolist()
            else:
                assert expert == ABSENT
                assert not mean_ED[index].any()
                assert (float(mean_E[index]), float(std_E[index])) == (0.0, 1.0)
    rows = [len(rows_NS) for rows_NS in embeddings(pool)]
    assert rows == [9, 10, 11, 12, 13]
