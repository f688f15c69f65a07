"""Check that a single expert from a pack is the expert of its object, without another file.

Shape suffixes: E experts, R rank, D input features, O output features.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.evaluation.actor import EvalActor
from harness.registry import Registry, packs
from harness.registry.packs import POOL_FILE, Members, open_pool, open_single, pool_id
from phatgoose.base import Base
from phatgoose.card import LoraFactors
from phatgoose.expert import Expert
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.routers import make_router
from phatgoose.routers.single import Single
from tests.support.pools import make_uneven_experts, without
from tests.support.tiny import make_experts

QUESTIONS = [Question([5, 9, 11, 20], [[12, 30, 1], [7, 1], [1]]), Question([8, 40], [[6, 1]])]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))


def published(folder: Path, base: Base, experts: Sequence[Expert]) -> Registry:
    registry = Registry(folder, base.fingerprint)
    for number, expert in enumerate(experts):
        card = dataclasses.replace(expert.card, job=f"{number:016x}")
        registry.publish(dataclasses.replace(expert, card=card))
    return registry


def packed(registry: Registry) -> Path:
    """Make the pack of the registry's pool; return its folder."""
    experts = registry.manifest().experts
    open_pool(registry, experts, registry.load)
    root = registry.folder.local("packs")
    assert root is not None
    return root / pool_id(experts)


def single(registry: Registry, name: str) -> Pool | None:
    return open_single(registry, name, registry.find(name))


def from_object(registry: Registry, name: str) -> Pool:
    return Pool.from_experts([registry.load(registry.find(name))])


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Return whether a tensor is a view of a mapped file."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in place.split("-"))
        if begin <= first and last <= end:
            return name == str(file)
    return False


def assert_same(found: Pool | None, expected: Pool) -> None:
    assert found is not None
    assert (found.base_fingerprint, found.experts) == (expected.base_fingerprint, expected.experts)
    assert list(found.linears) == list(expected.linears)
    for name, linear in expected.linears.items():
        other = found.linears[name]
        assert other.absent_E is None
        assert linear.absent_E is None
        assert linear.gate_ED is not None
        assert other.gate_ED is not None
        for ours, theirs in (
            (other.lora_A_ERD, linear.lora_A_ERD),
            (other.lora_B_EOR, linear.lora_B_EOR),
            (other.gate_ED, linear.gate_ED),
        ):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            # A stride says nothing where there is one entry.
            assert ours.stride()[1:] == theirs.stride()[1:]
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_a_single_expert_is_a_view_of_the_pack(base: Base, tmp_path: Path) -> None:
    experts = make_experts(base, 4)
    registry = published(tmp_path / "pool", base, experts)
    pools = {expert.card.name: from_object(registry, expert.card.name) for expert in experts}
    file = packed(registry) / POOL_FILE
    for content in registry.manifest().experts.values():
        registry.folder.delete(f"objects/{content}.arrow")  # no further file
    for name, expected in pools.items():
        found = single(registry, name)
        assert_same(found, expected)
        assert found is not None
        for linear in found.linears.values():
            assert is_mapped(linear.lora_A_ERD, file)
            assert is_mapped(linear.lora_B_EOR, file)


@pytest.mark.parametrize("router", ["single", "phatgoose", "merged"])
def test_an_actor_answers_from_the_pack_as_from_the_object(
    base: Base, tmp_path: Path, router: str
) -> None:
    registry = published(tmp_path / "pool", base, make_experts(base, 3))
    actor = object.__new__(EvalActor)
    actor._base, actor._model, actor._attached, actor._done = base, None, None, 0
    actor._registry = registry
    members = Members({"e1": registry.find("e1")})
    answers = []
    for has_pack in (False, True):
        if has_pack:
            packed(registry)
            registry.folder.delete(f"objects/{registry.find('e1')}.arrow")
        actor._attached = None
        actor._attach(members)
        actor._routed.set_router(Single("e1") if router == "single" else make_router(router))
        answers.append(actor._routed.score(QUESTIONS))
    actor._routed.set_router("base")
    assert answers[0] == answers[1] != actor._routed.score(QUESTIONS)


def test_an_expert_that_adapts_fewer_linears_has_only_those(base: Base, tmp_path: Path) -> None:
    experts = make_uneven_experts(base, 4)
    experts[0] = without(experts[0], "q", "q_proj")  # so the pool's linears have another order
    registry = published(tmp_path / "pool", base, experts)
    packed(registry)
    assert_same(single(registry, "e0"), from_object(registry, "e0"))
    assert_same(single(registry, "e2"), from_object(registry, "e2"))
    assert_same(single(registry, "e3"), from_object(registry, "e3"))
    # Zeros would add nothing, but sums of another length may round otherwise.
    assert single(registry, "e1") is None


@pytest.mark.parametrize("other", ["wider", "without gates"])
def test_what_other_experts_change_comes_from_the_object(
    base: Base, tmp_path: Path, other: str
) -> None:
    experts = make_experts(base, 2)
    if other == "wider":
        changed = {
            name: LoraFactors(*(tensor.double() for _, tensor in factors.tensors()))
            for name, factors in experts[1].linears.items()
        }
        experts[1] = Expert(experts[1].card, changed)
    else:
        experts[1] = make_experts(base, 2, gates=False)[1]
    registry = published(tmp_path / "pool", base, experts)
    packed(registry)
    assert single(registry, "e0") is None


@pytest.mark.parametrize("damage", ["none", "flip", "index", "other code", "other content"])
def test_without_an_intact_pack_there_is_no_view(
    llama: Base, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = published(tmp_path / "pool", llama, make_experts(llama, 2))
    if damage != "none":
        folder = packed(registry)
        assert single(registry, "e0") is not None
    if damage == "flip":
        data = bytearray((folder / POOL_FILE).read_bytes())
        data[-1] ^= 1
        (folder / POOL_FILE).write_bytes(data)
    elif damage == "index":
        (folder / "pack.json").write_text("{")
    elif damage == "other code":
        monkeypatch.setattr(packs, "_code", lambda: "0" * 16)
    elif damage == "other content":
        assert open_single(registry, "e0", "0" * 64) is None
        assert open_single(registry, "e9", registry.find("e0")) is None
        return
    assert single(registry, "e0") is None


def test_a_pack_that_this_machine_has_verified_comes_first(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check with packs of several pools, whose names are hashes and so in any order."""
    registry = published(tmp_path / "pool", llama, make_experts(llama, 4))
    pool = registry.manifest().experts
    for last in (2, 3, 4):
        open_pool(registry, dict(list(pool.items())[:last]), registry.load)
    notes = tmp_path / "cache" / "verified"
    kept = packs._note_of(packed(registry) / POOL_FILE)
    for note in notes.iterdir():
        if note != kept:
            note.unlink()
    monkeypatch.setattr(packs, "_hash", lambda *_: pytest.fail("another pack was read"))
    assert_same(single(registry, "e0"), from_object(registry, "e0"))
