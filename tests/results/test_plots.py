"""Draw the plots with the scripts as a user calls them, for both families of base."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import run_folder
from harness.reporting import plots
from harness.storage import Folder

SCRIPTS = Path(__file__).resolve().parents[2] / "results"
EXPERTS = ["plural", "sums", "rhymes", "anagrams"]
LLAMA = [
    f"model.layers.{layer}.{kind}"
    for layer in range(12)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
]
T5 = [
    f"{part}.block.{layer}.layer.{place}.{kind}"
    for part in ("encoder", "decoder")
    for layer in range(6)
    for place, kind in (
        [(0, "SelfAttention.q"), (1, "DenseReluDense.wi_0")]
        if part == "encoder"
        else [(0, "SelfAttention.q"), (1, "EncDecAttention.k"), (2, "DenseReluDense.wi_0")]
    )
]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def picture(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000
    return path


def write_routing(folder: Folder, router: str, linears: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for task in ("elementary_math_qa", "strategyqa"):
        for linear in linears:
            shares = rng.dirichlet(np.full(len(EXPERTS), 0.7))
            entropy = float(-(shares * np.log(shares)).sum())
            for expert, share in zip(EXPERTS, shares, strict=True):
                names = {"router": router, "suite": "held_out", "task": task, "linear": linear}
                numbers = {"share": float(share), "tokens": 100, "entropy": entropy}
                rows.append({**names, "expert": expert, **numbers})
    name = run_folder.routing_file("held_out", router)
    run_folder.write_table(folder, name, run_folder.ROUTING, rows)


def write_summary(folder: Folder) -> None:
    rows: list[dict[str, Any]] = []
    routers = ["base", "phatgoose", "merged", "random", "single:plural", "single:sums", "oracle"]
    for i, router in enumerate(routers):
        for metric, task in (("primary", None), ("nll", None), ("acc", "strategyqa")):
            value = 0.3 + 0.05 * i
            ends = {"value": value, "low": value - 0.1, "high": value + 0.1}
            names = {"suite": "held_out", "router": router, "metric": metric, "task": task}
            known = {"clusters": 100, "comparable": True}
            rows.append(
                {**names, "zero_shot": i < 4, "side_information": None, **ends, "n": 100, **known}
            )
            rows[-1] |= dict.fromkeys(["difference", "difference_low", "difference_high"])
    run_folder.write_table(folder, "summary.parquet", run_folder.SUMMARY, rows)


@pytest.mark.parametrize("linears", [LLAMA, T5], ids=["llama", "t5"])
def test_routing_plot_is_drawn(tmp_path: Path, linears: list[str]) -> None:
    write_routing(Folder(tmp_path), "phatgoose", linears)
    write_routing(Folder(tmp_path), "arrow", linears)
    path = picture(run("plot_routing.py", tmp_path))
    assert path == tmp_path / "plots" / "routing_phatgoose_elementary_math_qa.png"


def test_routing_plot_of_another_router_and_task(tmp_path: Path) -> None:
    write_routing(Folder(tmp_path), "single:plural", ["model.layers.0.mlp.up_proj"])
    path = picture(run("plot_routing.py", tmp_path, "--task", "strategyqa"))
    assert path.name == "routing_single@plural_strategyqa.png"
    done = run("plot_routing.py", tmp_path, "--task", "strategy")
    assert done.returncode != 0
    message = "no task strategy in this run; available: elementary_math_qa, strategyqa\n"
    assert done.stderr == message


def test_linears_are_sorted_into_kinds_and_layers() -> None:
    kind_and_layer = plots._kind_and_layer
    assert kind_and_layer("model.layers.11.mlp.up_proj") == ("mlp.up_proj", 11)
    assert kind_and_layer("decoder.block.3.layer.1.EncDecAttention.k") == (
        "decoder EncDecAttention.k",
        3,
    )
    places = [kind_and_layer(linear) for linear in (*LLAMA, *T5)]
    assert len(set(places)) == len(LLAMA) + len(T5)


def test_routers_plot_is_drawn(tmp_path: Path) -> None:
    write_summary(Folder(tmp_path))
    assert picture(run("plot_routers.py", tmp_path)) == tmp_path / "plots" / "routers.png"
    out = tmp_path / "elsewhere" / "nll.png"
    assert picture(run("plot_routers.py", tmp_path, "--metric", "nll", "--out", out)) == out


def test_routers_plot_names_missing_results(tmp_path: Path) -> None:
    done = run("plot_routers.py", tmp_path)
    assert done.returncode != 0
    assert "summary.parquet is missing" in done.stderr
    write_summary(Folder(tmp_path))
    done = run("plot_routers.py", tmp_path, "--metric", "f1")
    assert done.returncode != 0
    assert done.stderr == "no metric f1 in this run; available: primary, nll, acc\n"


def test_a_router_that_is_not_comparable_is_marked() -> None:
    label = plots._label
    row = {"router": "phatgoose", "comparable": True}
    assert label(row) == "phatgoose"
    assert label({**row, "comparable": None}) == "phatgoose"  # of version 0.1.0
    assert label({**row, "comparable": False}) == "phatgoose\n(not comparable)"
    assert label({"router": "single:a", "comparable": True}) == "best single\na"
