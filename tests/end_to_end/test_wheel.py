"""Check that the wheel, installed without the checkout, contains everything a run needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from harness import run_folder
from harness.storage import Folder
from tests.support.tiny_encoder import make_encoder
from tests.support.toy import prepare_toys, toy_arguments, toy_config

pytestmark = [
    pytest.mark.slow(seconds=35),
    pytest.mark.usefixtures("own_ray"),
]

ROOT = Path(__file__).parents[2]
SHIPPED = ("phatgoose", "harness", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def call(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout stays unchanged."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", ".")
    call(*pip, *build, cwd=source)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture
def python(tmp_path: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and the libraries of this one; return its interpreter."""
    environment = tmp_path / "environment"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    found = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    # A folder on the path, whose own .pth files (such as that of this checkout) are not processed.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return found


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kernels = {name for name in names if name.startswith("phatgoose_cpu_")}
    if shutil.which("g++"):
        assert {name.split(".")[0] for name in kernels} >= {"phatgoose_cpu_any"}
    shipped = names - kernels
    there = {
        str(path.relative_to(ROOT))
        for package in ("phatgoose", "harness")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == there


def test_an_installed_wheel_runs_without_the_checkout(
    python: Path, tmp_path: Path, llama_folder: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = call(python, "-c", "import harness; print(harness.__file__)", cwd=elsewhere).stdout
    assert str(tmp_path / "environment") in where
    # The kernel is found where the package is installed, also behind a checkout without it.
    shutil.copytree(ROOT / "phatgoose", tmp_path / "job" / "phatgoose")
    ask = "import torch, phatgoose; from phatgoose.ops.routed import way_on; print(way_on('cpu'))"
    for folder in (elsewhere, tmp_path / "job"):
        way = call(python, "-c", ask, cwd=folder).stdout
        assert way.startswith("kernel " if shutil.which("g++") else "torch")
    listed = call(python, "-m", "harness.tasks", "list", cwd=elsewhere).stdout
    for name in ("flan", "bigbench", "t0_heldout", "bbh", "demo"):
        assert name in listed
    assert "group=choice" in call(python, "-m", "harness.run", "--help", cwd=elsewhere).stdout

    run_dir = tmp_path / "run"
    make_encoder(tmp_path / "encoder")
    config = toy_config(llama_folder, run_dir)
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    arguments = [*toy_arguments(llama_folder, run_dir), "train.lora.steps=2", "train.gates.steps=1"]
    done = call(python, "-m", "harness.run", *arguments, "router=[base,phatgoose]", cwd=elsewhere)
    assert "suite held: primary metric" in done.stdout
    scores = run_folder.read_table(Folder(run_dir), run_folder.SCORES_FILE, run_folder.SCORES)
    assert {*scores["router"].to_pylist()} == {"base", "phatgoose"}
