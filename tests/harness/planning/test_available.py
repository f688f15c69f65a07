"""Check that routers which the resulting pool cannot serve are left out with a reason."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import RunConfig
from harness.planning.available import available_routers
from harness.planning.plan import Plan
from harness.registry import Registry
from phatgoose.base import load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from tests.support.pools import make_profiles
from tests.support.tiny import make_experts
from tests.support.toy import make_plan, prepare_toys, toy_config

ROUTERS: dict[str, Any] = {
    "merged": {},
    "retrieval": {},
    "genknowsub": {"general": "lakes"},
    "multitask": {"steps": 2},
    "single": {"experts": ["birds", "lakes"]},
}


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    made: RunConfig = toy_config(llama_folder, tmp_path / "run", router=ROUTERS)
    prepare_toys([*made.pool_tasks(), *made.suite_tasks(made.suites[0])], tmp_path)
    return made


def publish(plan: Plan, *names: str, profiles: bool = True) -> dict[str, str]:
    """Do the jobs of these experts; return their hashes by name, without the multitask expert's."""
    base = load_base(plan.config.base.name)
    registry = Registry(plan.config.registry, plan.base_fingerprint)
    [expert] = make_experts(base, 1)
    [profile] = make_profiles([expert])
    hashes = {}
    for job in plan.all_jobs:
        if job.card.name in names:
            content_hash = registry.publish(Expert(job.card, expert.linears))
            if job is not plan.multitask:
                hashes[job.card.name] = content_hash
            if profiles and job.profile_id:
                registry.put_profile(content_hash, job.profile_id, profile.to_bytes())
    return hashes


def test_every_router_is_served_by_a_complete_pool(config: RunConfig) -> None:
    plan = make_plan(config)
    experts = publish(plan, "birds", "lakes", "numbers", "multitask")
    served = available_routers(plan, Registry(config.registry, plan.base_fingerprint), experts)
    assert served.problems == []
    names = ["merged", "retrieval", "genknowsub", "multitask", "single:birds", "single:lakes"]
    assert list(served.routers) == names
    profiles = served.members.profiles
    assert profiles is not None
    assert profiles == {job.card.name: job.profile_id for job in plan.jobs}
    assert served.members.experts == experts
    assert plan.multitask is not None
    registry = Registry(config.registry, plan.base_fingerprint)
    assert served.others == {"multitask": registry.recorded(plan.multitask.card.job)}


def test_a_failed_expert_does_not_affect_unrelated_routers(config: RunConfig) -> None:
    plan = make_plan(config)
    experts = publish(plan, "birds", "numbers")
    served = available_routers(plan, Registry(config.registry, plan.base_fingerprint), experts)
    assert list(served.routers) == ["merged", "retrieval", "single:birds"]
    genknowsub, multitask, single = served.problems
    assert "router genknowsub is left out: the pool has no expert 'lakes'" in genknowsub
    assert multitask == "router multitask is left out: its expert is not trained"
    assert "router single:lakes is left out: the pool has no expert 'lakes'" in single


def test_a_missing_profile_affects_only_routers_that_read_profiles(
    config: RunConfig,
) -> None:
    plan = make_plan(config)
    experts = publish(plan, "birds", "lakes", "multitask")
    experts |= publish(plan, "numbers", profiles=False)
    served = available_routers(plan, Registry(config.registry, plan.base_fingerprint), experts)
    assert served.problems == ["router retrieval is left out: there is no profile of numbers"]
    assert served.members.profiles is None
    assert "retrieval" not in served.routers


def test_an_error_is_raised_if_no_router_is_left(config: RunConfig) -> None:
    plan = make_plan(dataclasses.replace(config, router={"retrieval": {}}))
    experts = publish(plan, "birds", profiles=False)
    with pytest.raises(PhatgooseError, match="router retrieval is left out: there is no profile"):
        available_routers(plan, Registry(config.registry, plan.base_fingerprint), experts)
