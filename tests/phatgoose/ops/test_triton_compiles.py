import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")


@pytest.mark.slow(60)
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_programs_compile_for_gpus(architecture: int, tmp_path: Path) -> None:
    """Check what the interpreter cannot: that they are Triton, and fit a GPU's registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.support.triton_compiler", str(architecture)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    programs = [json.loads(line) for line in result.stdout.splitlines()]
    assert {program["program"] for program in programs} == {
        "decode_program",
        "expand_program",
        "group_program",
        "inverse_std_program",
        "scores_program",
        "select_program",
        "shrink_program",
    }
    assert [program for program in programs if program["stack"]] == []
    # The first case is bfloat16: its products use the tensor cores, and its operands arrive early.
    first = {program["program"]: program for program in reversed(programs[:8])}
    for name in ("scores_program", "shrink_program", "expand_program"):
        assert first[name]["mma"]
    for name in ("scores_program", "shrink_program"):
        assert first[name]["copies"]
