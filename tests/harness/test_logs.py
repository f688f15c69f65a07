"""Check that messages go to the terminal as plain lines, and those of actors to their files."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from harness.logs import TerminalHandler, log_to_terminal


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("harness", "phatgoose")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers, logger.level = handlers, level


def test_terminal_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_terminal()
    log_to_terminal()  # twice makes no difference
    logger = logging.getLogger("harness.somewhere")
    logger.debug("too much")
    logger.info("trained   %s: %s", "plural", "loss: 2.00 -> 1.00")
    logger.warning("it is asked again")
    logger.error("pol: no such key")
    logging.getLogger("phatgoose.base").info("too much of the library")
    logging.getLogger("phatgoose.base").warning("the base has others")
    logging.getLogger("another.library").info("not ours")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "trained   plural: loss: 2.00 -> 1.00",
        "it is asked again",
        "error: pol: no such key",
        "the base has others",
    ]


def test_a_message_does_not_break_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=2, file=stream, mininterval=0) as bar:
        bar.update()
        TerminalHandler().handle(logging.makeLogRecord({"msg": "a line", "levelno": 20}))
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert "a line" in lines  # not after a bar on the same line


def test_an_actor_logs_to_a_file_with_its_other_output(tmp_path: Path) -> None:
    script = f"""
import logging, os
from harness.scheduling.actor import log_to_run_folder
log_to_run_folder({str(tmp_path)!r}, "train")
print("printed", flush=True)
os.write(2, b"from below Python\\n")
logging.getLogger("harness.training.actor").info("training %s", "plural")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout == done.stderr == ""
    [file] = (tmp_path / "logs").iterdir()
    assert file.name.startswith("train-")
    printed, below, logged = file.read_text().splitlines()
    assert (printed, below) == ("printed", "from below Python")
    assert logged.endswith(" INFO harness.training.actor: training plural")
    assert logged[:2] == "20"  # the time comes first


def test_the_log_of_an_actor_reaches_a_bucket(tmp_path: Path) -> None:
    """Check a run folder without local files; a bucket would only be slower."""
    script = f"""
import logging
from pathlib import Path
from harness.scheduling import actor
from harness.storage import Folder
Folder.local = lambda *_: None
actor._COPY_SECONDS = 0.01
actor.log_to_run_folder({str(tmp_path)!r}, "evaluate")
for line in ("one", "two"):
    logging.getLogger("harness.evaluation.actor").info(line)
    while not any(line in f.read_text() for f in Path({str(tmp_path)!r}).glob("logs/*.log")):
        pass
"""
    root, temporary = Path(__file__).parents[2], tmp_path / "temporary"
    temporary.mkdir()
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        check=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    [file] = (tmp_path / "logs").iterdir()
    assert file.name.startswith("evaluate-")
    assert [line.split()[-1] for line in file.read_text().splitlines()] == ["one", "two"]
