import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from harness import run_folder
from harness.config.schema import RunConfig
from harness.run import run
from harness.storage import Folder
from tests.support.toy import prepare_toys, toy_config

pytestmark = [pytest.mark.slow(seconds=75), pytest.mark.usefixtures("own_ray")]

EXPERTS = {"birds", "lakes", "numbers"}
SINGLES = {f"single:{expert}" for expert in EXPERTS}
ROUTERS = {"base", "phatgoose", "merged", "random", "oracle", *SINGLES}
METRICS = {
    "swans": {
        *("acc", "acc_norm", "acc_paper", "nll"),
        *("multiple_choice_grade", "bigbench_normalized"),
    },
    "sums": {"exact_match", "nll", "bigbench_normalized"},
}


@pytest.fixture
def two_nodes(own_ray: Path) -> Iterator[None]:
    """Provide two nodes of one core each on this machine; neither has room for two actors."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
        },
    )
    try:
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 * 2**20)
        ray.init(address=cluster.address, namespace="phatgoose", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def config_of(base: Path, tmp_path: Path) -> RunConfig:
    config: RunConfig = toy_config(base, tmp_path / "run")
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    return config


def times(folder: Path) -> dict[str, int]:
    """Return when each file below a folder was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def read(run_dir: Path, name: str, schema: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run_folder.read_table(Folder(run_dir), name, schema).to_pylist()
    return rows


def check_scores(run_dir: Path) -> None:
    scores = read(run_dir, run_folder.SCORES_FILE, run_folder.SCORES)
    values = {(row["router"], row["task"], row["metric"]): row["value"] for row in scores}
    assert len(values) == len(scores)
    assert {router for router, _, _ in values} == ROUTERS
    for router in ROUTERS:
        for task, metrics in METRICS.items():
            assert {m for r, t, m in values if (r, t) == (router, task)} == metrics
    for (router, task, metric), value in values.items():
        sign = -1 if metric == "nll" else 1
        if router in SINGLES:
            assert sign * values["oracle", task, metric] >= sign * value
    # The experts differ from the base and from each other.
    nll = {router: values[router, "swans", "nll"] for router in ROUTERS}
    assert len({nll[router] for router in ROUTERS - {"oracle"}}) == len(ROUTERS) - 1
    [manifest] = {row["manifest"] for row in scores}
    assert (run_dir / "registry" / "packs" / manifest / "pool.safetensors").exists()


def check_files(run_dir: Path, linears: int) -> None:
    for router in ROUTERS - {"oracle"}:
        samples = read(run_dir, run_folder.samples_file("held", router), run_folder.SAMPLES)
        assert len(samples) == 8 + 8
    for router in ("phatgoose", "random"):
        routing = read(run_dir, run_folder.routing_file("held", router), run_folder.ROUTING)
        # A generated answer is routed too, when its right answer is scored.
        assert len(routing) == len(METRICS) * linears * len(EXPERTS)
    for expert in EXPERTS:
        curve = read(run_dir, run_folder.training_file(expert), run_folder.TRAINING)
        assert [row["step"] for row in curve if row["split"] == "train"] == [*range(4), *range(2)]
        losses = {
            (row["stage"], row["step"]): row["loss"] for row in curve if row["split"] != "train"
        }
        assert losses.keys() == {("lora", 0), ("lora", 4), ("gates", 0), ("gates", 2)}
        assert losses["lora", 4] < losses["lora", 0]
    summary = read(run_dir, run_folder.SUMMARY_FILE, run_folder.SUMMARY)
    assert {row["router"] for row in summary} == ROUTERS
    record = json.loads((run_dir / "run.json").read_text())
    [call] = record["calls"]
    assert call["problems"] == []
    assert call["finished"] > call["started"]
    assert call["configuration"]["pool"]["name"] == "toys"
    for name in ("routers.png", "routing.png"):
        [picture] = (run_dir / "plots").glob(f"*{name.removesuffix('.png')}*.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list((run_dir / "registry" / "objects").iterdir())) == len(EXPERTS)


def check_complete_run(config: RunConfig, linears: int, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(config.run.dir)
    run(config)
    output = capsys.readouterr()
    assert "3 of 3 jobs" in output.out
    assert "suite held: primary metric" in output.out
    assert "experts on the evaluation split" in output.out
    assert "\r" not in output.err  # no progress bars without a terminal
    for expert in EXPERTS:
        assert f"trained   {expert}: loss" in output.err
    check_scores(run_dir)
    check_files(run_dir, linears)

    scores = read(run_dir, run_folder.SCORES_FILE, run_folder.SCORES)
    kept = {name: times(run_dir / name) for name in ("registry", "answers", "training", "logs")}
    assert all(kept.values())
    run(config)
    output = capsys.readouterr()
    assert "0 of 3 jobs" in output.out
    assert "trained" not in output.err
    assert {name: times(run_dir / name) for name in kept} == kept
    assert read(run_dir, run_folder.SCORES_FILE, run_folder.SCORES) == scores


@pytest.mark.usefixtures("two_nodes")
def test_a_complete_run_on_two_nodes(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(llama_folder, tmp_path)
    check_complete_run(config, 2 * 7, capsys)
    # Both nodes took part: there is one log per actor.
    logs = [path.name.partition("-")[0] for path in (tmp_path / "run" / "logs").iterdir()]
    assert sorted(logs) == ["evaluate", "evaluate", "score", "train", "train"]


def test_a_complete_run_of_an_encoder_decoder(
    tmp_path: Path, t5_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_complete_run(config_of(t5_folder, tmp_path), 2 * 7 + 2 * 11, capsys)
    assert not ray.is_initialized()
