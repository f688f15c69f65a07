"""Kill one process of each kind on a real cluster; `make chaos` does far more."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.chaos.killer import KINDS, plan

ROOT = Path(__file__).parents[2]
DEADLINE = 900.0


def test_a_plan_has_every_kind_of_kill_and_depends_on_the_seed_alone() -> None:
    for seed in range(20):
        planned = plan(seed, 20)
        assert planned == plan(seed, 20)
        assert [kill.phase for kill in planned] == ["train"] * 10 + ["evaluate"] * 10
        for phase in ("train", "evaluate"):
            of_phase = [kill for kill in planned if kill.phase == phase]
            others = {"evaluator", "scorer"} if phase == "train" else {"trainer"}
            assert {*KINDS} - {kill.kind for kill in of_phase} == others
            assert [kill.share for kill in of_phase] == sorted(kill.share for kill in of_phase)
        assert {kill.kind for kill in plan(seed, 6)} == {*KINDS}
    assert plan(1, 20) != plan(2, 20)


@pytest.mark.slow(seconds=200)
def test_a_disturbed_run_gives_the_results_of_an_undisturbed_one(tmp_path: Path) -> None:
    # A separate process, because the processes of a cluster end with the thread that started them.
    command = [sys.executable, "-m", "tests.chaos", "--seed", "1", "--kills", "6"]
    done = subprocess.run(
        [*command, "--experts", "8", "--steps", "120", "--out", str(tmp_path / "chaos")],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = pq.read_table(tmp_path / "chaos" / "kills.parquet")
    assert {*kills["kind"].to_pylist()} == {*KINDS}
