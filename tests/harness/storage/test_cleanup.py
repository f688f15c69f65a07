import os
import subprocess
import sys
from pathlib import Path

from harness.storage import Folder
from harness.storage.cleanup import remove_left_over
from phatgoose.files import temporary_name

WRITE = """
from phatgoose.files import temporary_name
print(temporary_name())
"""


def name_of_a_dead_process() -> str:
    done = subprocess.run([sys.executable, "-c", WRITE], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_only_files_left_by_dead_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "packs").mkdir()
    dead = tmp_path / "answers" / name_of_a_dead_process()
    dead.write_bytes(b"half")
    folder = tmp_path / "packs" / name_of_a_dead_process()
    folder.mkdir()
    (folder / "pool.safetensors").write_bytes(b"half")
    mine = tmp_path / "answers" / temporary_name()
    others = tmp_path / "answers" / dead.name.replace(".", ".elsewhere", 1)
    for kept in (mine, others, tmp_path / "answers" / "answer.parquet", tmp_path / ".tmp"):
        kept.write_bytes(b"whole")
    assert remove_left_over(Folder(tmp_path)) == 2
    assert not dead.exists()
    assert not folder.exists()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    assert remove_left_over(Folder(tmp_path)) == 0


def test_a_missing_folder_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_left_over(Folder(tmp_path / "nothing")) == 0


def test_temporary_names_are_unique() -> None:
    names = {temporary_name() for _ in range(10)}
    assert len(names) == 10
    assert all(f"-{os.getpid()}-" in name and name.startswith(".") for name in names)
