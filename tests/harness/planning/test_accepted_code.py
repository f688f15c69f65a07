"""Check that experts and profiles made by other source code stop a run, unless accepted."""

import dataclasses
import json
from pathlib import Path

import pytest

from harness.config.schema import RunConfig
from harness.planning import jobs as plan_jobs
from harness.planning.plan import Plan
from harness.registry import Registry
from harness.registry.files import Record, job_file, read_record
from harness.source_code import PROFILES, TRAINING, code_of, digest
from phatgoose.base import load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from tests.support.tiny import make_experts
from tests.support.toy import make_plan, prepare_toys, toy_config

OLD = {**code_of(TRAINING), "phatgoose.training.trainer": "0" * 16}


@pytest.fixture
def config(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    config: RunConfig = toy_config(llama_folder, tmp_path / "run")
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    return config


def publish(plan: Plan, code: dict[str, str] | None, *names: str) -> Registry:
    base = load_base(plan.config.base.name)
    registry = Registry(plan.config.registry, plan.base_fingerprint)
    [expert] = make_experts(base, 1)
    for job in plan.jobs:
        if job.card.name in names:
            registry.publish(Expert(job.card, expert.linears), code=code)
    return registry


def test_experts_of_this_code_are_reused(config: RunConfig) -> None:
    plan = make_plan(config)
    publish(plan, code_of(TRAINING), "birds", "lakes")
    assert len(make_plan(config).open_jobs) == 1


def test_experts_of_other_code_stop_the_run_and_are_not_trained_again(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(config)
    publish(plan, OLD, "birds", "lakes")
    with pytest.raises(PhatgooseError) as caught:
        make_plan(config)
    line = str(caught.value)
    assert "2 experts (birds, lakes) were made by other source code" in line
    assert "phatgoose.training.trainer changed since" in line
    assert "train.accept_code=true" in line
    assert "\n" not in line
    accepted = make_plan(dataclasses.replace(config, accept_code=True))
    assert [job.card.name for job in accepted.open_jobs] == ["numbers"]
    # What is accepted is reported, with the changed module.
    [record] = caplog.records
    assert "2 experts (birds, lakes) were made by other source code" in record.getMessage()
    assert "phatgoose.training.trainer changed since" in record.getMessage()
    # On request, one is trained again.
    registry = Registry(config.registry, plan.base_fingerprint)
    registry.remove("birds")
    registry.remove("lakes")
    assert len(make_plan(config).open_jobs) == 3


def test_experts_of_version_0_1_0_stay_usable(config: RunConfig) -> None:
    """Check that records without code have the same job ids."""
    plan = make_plan(config)
    registry = publish(plan, None, "birds")
    [job] = [job.card.job for job in plan.jobs if job.card.name == "birds"]
    record = read_record(registry.folder, job_file(job))
    assert record is not None
    assert record.code == ""
    old = {"object": record.object, "name": "birds"}  # as written by 0.1.0, except for the checksum
    registry.folder.write(job_file(job), json.dumps(old).encode())
    assert [job.card.name for job in make_plan(config).open_jobs] != []
    assert len(make_plan(config).open_jobs) == 2


def test_the_id_of_a_job_is_the_same_as_in_version_0_1_0(config: RunConfig) -> None:
    """Check the ids under which registries of 0.1.0 store hundreds of experts."""
    plan = make_plan(config)
    card = plan.jobs[0].card
    recipe = dataclasses.asdict(config.train)
    for added_later in ("gradient_checkpointing", "sort_window"):
        del recipe[added_later]
    determines = {
        "version": 1,
        "name": card.name,
        "base": plan.base_fingerprint,
        "data": plan.pool[0].fingerprint,
        "recipe": recipe,
    }
    assert card.job == plan_jobs._digest(determines)


def test_profiles_of_other_code_stop_the_run(config: RunConfig) -> None:
    plan = make_plan(config)
    registry = publish(plan, code_of(TRAINING), "birds")
    [birds] = [job for job in plan.jobs if job.card.name == "birds"]
    content = registry.records([birds.card.job])[birds.card.job].object
    assert birds.profile_id is not None
    measured, _, code = birds.profile_id.partition("-")
    assert code == digest(code_of(PROFILES))
    other = registry.put_code({**code_of(PROFILES), "phatgoose.profile_measurement": "1" * 16})
    registry.put_profile(content, f"{measured}-{other}", b"a profile")
    with pytest.raises(
        PhatgooseError, match=r"1 profiles \(birds\) were made by .*profile_measurement"
    ):
        make_plan(config)
    accepted = make_plan(dataclasses.replace(config, accept_code=True))
    ids = {job.card.name: job.profile_id for job in accepted.jobs}
    assert ids["birds"] == f"{measured}-{other}"
    assert str(ids["lakes"]).endswith(f"-{code}")
    # A profile measured by this code is preferred.
    registry.put_profile(content, f"{measured}-{code}", b"a profile")
    assert make_plan(config).jobs[0].profile_id == f"{measured}-{code}"


def test_profiles_of_version_0_1_0_stay_usable(config: RunConfig) -> None:
    plan = make_plan(config)
    registry = publish(plan, None, "birds")
    [birds] = [job for job in plan.jobs if job.card.name == "birds"]
    content = registry.records([birds.card.job])[birds.card.job].object
    measured = str(birds.profile_id).partition("-")[0]
    registry.put_profile(content, measured, b"a profile")
    assert make_plan(config).jobs[0].profile_id == measured


def test_a_record_stores_its_code(tmp_path: Path) -> None:
    from harness.storage import Folder

    record = Record("a" * 64, "birds", "b" * 16)
    Folder(tmp_path).write(job_file("c" * 32), record.to_bytes())
    assert read_record(Folder(tmp_path), job_file("c" * 32)) == record
