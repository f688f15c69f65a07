"""Check that the API reference, the columns of results and the metadata agree with the code."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from packaging.requirements import Requirement

import phatgoose
import phatgoose.routers
from harness import run_folder
from tests.docs.pages import ROOT, blocks

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCHEMAS = {
    "scores.parquet": run_folder.SCORES,
    "summary.parquet": run_folder.SUMMARY,
    "samples/<suite>/<router>.parquet": run_folder.SAMPLES,
    "routing/<suite>/<router>.parquet": run_folder.ROUTING,
    "training/<expert>.parquet": run_folder.TRAINING,
    "overlap.parquet": run_folder.OVERLAP,
    "jobs.parquet": run_folder.JOBS,
}


def test_every_public_name_is_in_the_reference() -> None:
    documented = set(re.findall(r"^\.\. (?:auto|py:)\w+:: phatgoose\.(\w+)$", API, re.MULTILINE))
    assert documented == set(phatgoose.__all__)


def test_the_router_interface_is_in_the_reference() -> None:
    documented = set(re.findall(r"^\.\. auto\w+:: phatgoose\.routers\.(\w+)$", API, re.MULTILINE))
    assert documented == set(phatgoose.routers.__all__) - set(phatgoose.__all__)


@pytest.mark.parametrize("file", SCHEMAS)
def test_the_columns_match_the_schema(file: str) -> None:
    rows = re.findall(r"^\| `(.+?)` \| .*? \| (.*?) \|$", RESULTS.read_text(), re.MULTILINE)
    assert dict(rows)[file].split(", ") == SCHEMAS[file].names


def test_the_example_prints_every_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([], run_folder.SCORES), folder / "scores.parquet")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(RESULTS, "python")
    exec(compile(example, "results.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == (
        run_folder.SCORES.names
    )


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert "2402.05859" in citation["references"][0]["url"]


def requirements() -> list[Requirement]:
    extras = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    lines = [line for line in [*PROJECT["dependencies"], *extras] if "phatgoose" not in line]
    return [Requirement(line) for line in lines]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_tested_versions_are_within_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {normal(name): pin for name, pin in pins.items()}
    for requirement in requirements():
        assert pinned[normal(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", ["ray", "deepspeed", "transformers", "peft", "lm-eval"])
def test_libraries_used_by_internal_names_have_an_upper_bound(name: str) -> None:
    (found,) = [r for r in requirements() if r.name == name]
    assert any(one.operator == "<" for one in found.specifier)
    assert version(name) in found.specifier


def test_hooks_run_tools_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    for hook in hooks:
        tool = Path(hook["entry"].split()[0])
        assert tool.parent == Path(".venv/bin"), hook["id"]
        assert Path(sys.executable).with_name(tool.name).exists(), hook["id"]
