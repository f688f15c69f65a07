"""Check uses of Ray's internals on a real Ray, and that only one module has them."""

import re
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants

from harness.scheduling import ray_internals

ROOT = Path(__file__).parents[3]


def test_only_one_module_uses_ray_internals() -> None:
    packages = ("harness", "phatgoose", "benchmarks", "results", "docs", "examples")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    found = [
        file.relative_to(ROOT).as_posix()
        for file in files
        if re.search(r"^\s*(from|import) ray\._", file.read_text(), re.M)
    ]
    assert found == ["harness/scheduling/ray_internals.py"]


def test_the_setting_is_restored() -> None:
    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_internals.loopback_only():
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert before == ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.slow
def test_states_of_nodes_and_actors_are_read(two_cores: None) -> None:
    class Busy:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    actor = ray.remote(num_cpus=1)(Busy).remote()
    node = ray.get(actor.node.remote())
    assert ray_internals.available_resources_by_node()[node]["CPU"] == 1
    assert ray_internals.draining_nodes() == frozenset()
    states = ray_internals.actor_states()
    assert [state for name, state in states.items() if "Busy " in name] == ["ALIVE"]
    assert ray_internals.started_address() is None
