"""Do a complete run that stores everything in a bucket of an S3-compatible server."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from harness import run_folder
from harness.config.schema import RunConfig, RunSection
from harness.registry.verify import Check, verify
from harness.run import run
from harness.scheduling.settings import ClusterConfig
from harness.storage import Folder
from tests.support.s3_server import S3Server
from tests.support.toy import prepare_toys, toy_config

pytestmark = [pytest.mark.slow(seconds=30), pytest.mark.usefixtures("own_ray")]

EXPERTS = {"birds", "lakes", "numbers"}


def test_a_complete_run_in_a_bucket(
    s3: S3Server, tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, registry = s3.uri(f"{tmp_path.name}/run"), s3.uri(f"{tmp_path.name}/registry")
    config: RunConfig = toy_config(
        llama_folder,
        tmp_path / "nothing",
        router={"base": {}, "phatgoose": {"top_k": 2}, "merged": {}},
        run=RunSection(run_dir),
        cluster=ClusterConfig(max_actors=1),
        registry=registry,
    )
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    run(config)
    said = capsys.readouterr()
    assert "3 of 3 jobs" in said.out
    assert f"all files are in s3://bucket/{tmp_path.name}/run" in said.out
    assert not (tmp_path / "nothing").exists()
    assert verify(Folder(registry), every_manifest=True) == Check(3)

    filesystem, path = fs.FileSystem.from_uri(run_dir)  # as any reader would open it
    scores = pq.read_table(f"{path}/{run_folder.SCORES_FILE}", filesystem=filesystem)
    assert set(scores["router"].to_pylist()) == {"base", "phatgoose", "merged"}
    assert scores.schema.equals(run_folder.SCORES)
    names = Folder(run_dir).names()
    assert {f"training/{expert}.parquet" for expert in EXPERTS} <= set(names)
    assert {"run.json", "jobs.parquet", "summary.parquet", "samples/held/phatgoose.parquet"} <= {
        *names
    }

    kept = {entry.path: entry for entry in Folder(registry).entries()}
    run(config)
    said = capsys.readouterr()
    assert "0 of 3 jobs" in said.out
    assert "trained" not in said.err
    assert {entry.path: entry for entry in Folder(registry).entries()} == kept
    again = pq.read_table(f"{path}/{run_folder.SCORES_FILE}", filesystem=filesystem)
    assert again.equals(scores)
