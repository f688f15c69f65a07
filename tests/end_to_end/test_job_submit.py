"""Run `ray job submit` to a head started by `ray start`, as in docs/clusters.md."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import run_folder
from harness.config.load import load_config
from harness.storage import Folder
from tests.support.tiny_encoder import make_encoder
from tests.support.toy import prepare_toys, toy_arguments

pytestmark = pytest.mark.slow(seconds=45)

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
DEADLINE = 300.0
BIG = 600 * 2**20  # more than Ray accepts
TOKEN = "0123456789abcdef" * 4


def environment(ray_folder: Path) -> dict[str, str]:
    """Return the environment of the head, without the job's settings and this checkout's code."""
    hidden = ("PHATGOOSE_CACHE", "HF_HUB_OFFLINE", "PYTHONPATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {
        **kept,
        "PATH": f"{RAY.parent}:{kept['PATH']}",
        "RAY_TMPDIR": str(ray_folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay on 127.0.0.1
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def is_up(dashboard: str) -> bool:
    """Return whether jobs can be submitted."""
    question = urllib.request.Request(
        f"{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    try:
        with urllib.request.urlopen(question, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def of_session(ray_folder: Path) -> list[psutil.Process]:
    """Return the processes of the Ray with this session folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and str(ray_folder) in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def dashboard(own_ray: Path) -> Iterator[str]:
    """Start a head of two cores; yield its dashboard address; end all its processes afterwards."""
    port = free_port()
    options = {
        "node-ip-address": "127.0.0.1",
        "port": "0",
        "num-cpus": "2",
        "object-store-memory": str(100 * 2**20),
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": str(port),
        "dashboard-agent-listen-port": str(free_port()),
        "ray-client-server-port": str(free_port()),
        "temp-dir": str(own_ray),
    }
    with (own_ray / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())],
            env=environment(own_ray),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while not is_up(f"http://127.0.0.1:{port}"):
            assert head.poll() is None, (own_ray / "head.log").read_text()
            assert time.monotonic() < deadline, (own_ray / "head.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        # Not `ray stop`, which would end every Ray of this machine.
        head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        left = of_session(own_ray)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait(10)
        psutil.wait_procs(left, timeout=10)
        assert not of_session(own_ray)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the code of a checkout, with ignored files that are too large to be sent."""
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("harness", "phatgoose"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    shutil.copy(ROOT / ".gitignore", folder)
    for name in (".venv", "runs"):
        (folder / name).mkdir()
        with (folder / name / "big").open("wb") as file:
            file.truncate(BIG)
    return folder


def ray_job(
    ray_folder: Path, dashboard: str, call: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run `ray job <call>` to its end."""
    return subprocess.run(
        [RAY, "job", call, "--address", dashboard, *arguments],
        env=environment(ray_folder),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_a_submitted_job_completes_the_run(
    dashboard: str, checkout: Path, tmp_path: Path, llama_folder: Path, own_ray: Path
) -> None:
    run_dir = tmp_path / "run"
    given = [*toy_arguments(llama_folder, run_dir), "train.lora.steps=4", "train.gates.steps=2"]
    make_encoder(tmp_path / "encoder")
    config = load_config(given)
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    # Without the first, actors would not find the data, which are not available elsewhere.
    passed_on = {"PHATGOOSE_CACHE": os.environ["PHATGOOSE_CACHE"], "HF_HUB_OFFLINE": "1"}
    what = ["--submission-id", "toys", "--working-dir", str(checkout)]
    what += ["--runtime-env-json", json.dumps({"env_vars": passed_on})]
    command = ["python", "-m", "harness.run", *given]
    submitted = ray_job(own_ray, dashboard, "submit", *what, "--", *command)
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert "trained   birds: loss" in said
    assert "suite held: primary metric" in said
    status = ray_job(own_ray, dashboard, "status", "toys")
    assert "succeeded" in status.stdout + status.stderr
    scores = run_folder.read_table(Folder(run_dir), run_folder.SCORES_FILE, run_folder.SCORES)
    assert {"base", "phatgoose", "oracle"} <= set(scores["router"].to_pylist())
    assert json.loads((run_dir / run_folder.RUN_FILE).read_text())["calls"][0]["problems"] == []
    assert len(list((run_dir / "registry" / "objects").iterdir())) == 3
