"""Turn three files of a user into a pool of three experts and a suite, with one command."""

import json
from pathlib import Path

import pytest

from harness import run_folder
from harness.config.load import load_config
from harness.run import run
from harness.storage import Folder
from tests.support.tiny_encoder import make_encoder


@pytest.mark.slow(seconds=25)
@pytest.mark.usefixtures("two_cores")
def test_three_files_become_a_pool_and_a_suite(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"birds": "goose", "lakes": "deep", "numbers": "five"}
    for name, answer in answers.items():
        lines = [{"input": f"the {name} {i} is", "target": answer} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    make_encoder(tmp_path / "encoder")
    config = load_config(
        [
            "pool=jsonl",
            f"pool.files='{tmp_path}/*.jsonl'",
            "suite=held_in",
            "suite.limit=4",
            f"base={llama_folder}",
            "router=[base,phatgoose,merged]",
            "train.lora.steps=4",
            "train.gates.steps=2",
            "train.rank=2",
            "cluster.max_actors=1",
            f"profile.encoder={tmp_path / 'encoder'}",
            f"run.dir={tmp_path / 'run'}",
        ]
    )
    run(config)
    assert "suite held_in" in capsys.readouterr().out
    folder = Folder(config.run.dir)
    scores = run_folder.read_table(folder, run_folder.SCORES_FILE, run_folder.SCORES).to_pylist()
    assert {row["task"] for row in scores} == set(answers)
    assert {row["router"] for row in scores} == {"base", "phatgoose", "merged"}
    assert {row["n"] for row in scores} == {4}
    assert {row["metric"] for row in scores} == {"exact_match", "nll"}
    overlap = run_folder.read_table(folder, run_folder.OVERLAP_FILE, run_folder.OVERLAP)
    assert len(overlap) == 0
