"""Check every launch file against the schema of its reader and the rules common to all of them."""

import gzip
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTERS = Path(__file__).parents[2] / "clusters"
SCHEMAS = Path(__file__).with_name("kuberay_v1.json.gz")
RAY_UP = ("aws", "gcp", "onprem", "local")
KUBERAY = ("kuberay-cluster", "kuberay-rayjob")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    return loaded


def closed(schema: Any) -> Any:
    """Return a closed schema, which refuses unknown keys that the server would drop silently."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    return made


def kuberay_schema(kind: str) -> Any:
    schema = closed(json.loads(gzip.decompress(SCHEMAS.read_bytes()))[kind])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_accepts_the_file(name: str) -> None:
    document = load(name)
    jsonschema.validate(document, kuberay_schema(document["kind"]))


@pytest.mark.parametrize("place", ["spec", "template"])
def test_the_schema_refuses_a_mistyped_key(place: str) -> None:
    document = load("kuberay-cluster")
    spec = document["spec"]
    target = spec if place == "spec" else spec["headGroupSpec"]["template"]["spec"]
    target["contaners"] = []
    with pytest.raises(jsonschema.ValidationError, match="contaners"):
        jsonschema.validate(document, kuberay_schema("RayCluster"))


def all_files() -> list[Path]:
    return [path for path in sorted(CLUSTERS.iterdir()) if path.is_file()]


@pytest.mark.parametrize("path", all_files(), ids=lambda path: path.name)
def test_no_file_contains_a_secret_or_opens_a_port(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"(?i)(secret|password|access)_?key\s*[:=]|AKIA[0-9A-Z]{16}", text)
    assert "0.0.0.0" not in text
    assert ":latest" not in text
    assert "nightly" not in text


def test_versions_match_the_constraints() -> None:
    ray = importlib.metadata.version("ray")
    pinned = (CLUSTERS.parent / "constraints.txt").read_text()
    assert f"ray=={ray}" in pinned
    assert f"FROM rayproject/ray:{ray}-" in (CLUSTERS / "Dockerfile").read_text()
    assert load("kuberay-cluster")["spec"]["rayVersion"] == ray
    assert load("kuberay-rayjob")["spec"]["rayClusterSpec"]["rayVersion"] == ray


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_cloud_files_follow_the_rules(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {kind: node["labels"]["group"] for kind, node in types.items()} == {
        kind: kind for kind in ("head", "train", "evaluate")
    }
    spot = {kind for kind, node in types.items() if re.search("(?i)spot", json.dumps(node))}
    assert spot == {"train"}
    assert all(
        types[kind]["max_workers"] <= config["max_workers"] for kind in ("train", "evaluate")
    )
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    for commands in (start, " ".join(config["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in commands


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_files_follow_the_rules(name: str) -> None:
    spec = load(name)["spec"]
    if name == "kuberay-rayjob":
        for key in ("submissionMode", "backoffLimit", "activeDeadlineSeconds"):
            assert spec[key]
        assert spec["shutdownAfterJobFinishes"]
        assert spec["ttlSecondsAfterFinished"]
        spec = spec["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token"}
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {name: group["labels"] for name, group in groups.items()} == {
        "train": {"group": "train"},
        "evaluate": {"group": "evaluate"},
    }
    spot = {name for name, group in groups.items() if "spot" in json.dumps(group)}
    assert spot == {"train"}


def test_the_harness_accepts_the_command_of_the_job() -> None:
    """Check that its overrides compose, with the labels of the nodes in the same file."""
    from harness.config.load import load_config

    words = load("kuberay-rayjob")["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "harness.run"]
    config = load_config(words[3:])
    assert config.cluster.train_nodes == {"group": "train"}
    assert config.cluster.evaluate_nodes == {"group": "evaluate"}


def tool(name: str) -> str:
    """Return the path of a linter that the package index distributes as a wheel."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.fail(f"{name} is not installed: pip install -e '.[dev]'")
    return str(path)


def test_the_slurm_script_passes_shellcheck() -> None:
    script = CLUSTERS / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    refused = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert (refused.returncode, "usage: sbatch" in refused.stderr) == (2, True)


def test_the_dockerfile_passes_hadolint() -> None:
    command = [tool("hadolint"), str(CLUSTERS / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
