"""Edit source code between two calls of one run, as real processes see it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import harness
import phatgoose
from harness import run_folder
from harness.storage import Folder
from tests.support.tiny_encoder import make_encoder
from tests.support.toy import prepare_toys, toy_arguments, toy_config

pytestmark = [pytest.mark.slow(seconds=80), pytest.mark.usefixtures("own_ray")]


class Checkout:
    """A copy of both packages, in which runs are started."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        for package in (phatgoose, harness):
            assert package.__file__ is not None
            shutil.copytree(Path(package.__file__).parent, folder / package.__name__)
        make_encoder(folder / "encoder")
        config = toy_config(base, self.run_dir)
        prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], folder)
        self.arguments = [
            *toy_arguments(base, self.run_dir),
            "router=[base,phatgoose,merged]",
            "train.lora.steps=3",
            "train.gates.steps=2",
        ]

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "harness.run", *self.arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    def values(self) -> dict[str, list[float]]:
        table = run_folder.read_table(
            Folder(self.run_dir), run_folder.SCORES_FILE, run_folder.SCORES
        )
        found: dict[str, list[Any]] = {}
        for row in table.to_pylist():
            found.setdefault(row["router"], []).append(row["value"])
        return found


def test_new_code_gives_new_numbers_and_keeps_other_answers(
    tmp_path: Path, llama_folder: Path
) -> None:
    checkout = Checkout(tmp_path, llama_folder)
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    assert "asked again" not in first.stderr
    before = checkout.values()
    evaluations = pq.read_table(checkout.run_dir / run_folder.EVALUATIONS_FILE)
    (shards,) = {*evaluations["shards"].to_pylist()}

    # A formula changes the answers of its own router.
    checkout.edit("phatgoose/routers/phatgoose.py", "gate_ED,\n", "-gate_ED,\n")
    checkout.edit("phatgoose/routers/merged.py", '"""Stack the', '# Note.\n        """Pile the')
    edited = checkout.run()
    assert edited.returncode == 0, edited.stderr
    lines = [line for line in edited.stderr.splitlines() if "asked again" in line]
    assert lines == [
        f"phatgoose.routers.phatgoose changed: {shards} shards of phatgoose are asked again"
    ]
    after = checkout.values()
    assert after["phatgoose"] != before["phatgoose"]
    assert {r: v for r, v in after.items() if r != "phatgoose"} == {
        r: v for r, v in before.items() if r != "phatgoose"
    }

    # Changed training code stops the run until it is accepted.
    checkout.edit("phatgoose/training/trainer.py", "4 * self.recipe", "2 * self.recipe")
    stopped = checkout.run()
    assert stopped.returncode == 2
    assert "3 experts (birds, lakes, numbers) were made by other source code" in stopped.stderr
    assert "phatgoose.training.trainer" in stopped.stderr
    assert checkout.values() == after
