import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import storage
from harness.storage import Folder
from phatgoose.errors import PhatgooseError


@pytest.fixture(params=["path", "uri", "mock"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder: local by path, local by URI, and on pyarrow's in-memory filesystem."""
    uris: dict[str, str | Path] = {
        "path": tmp_path / "pool",
        "uri": f"{tmp_path.as_uri()}/pool",
        "mock": "mock:///pool",
    }
    return Folder(uris[request.param])


def test_write_read_and_overwrite(folder: Folder) -> None:
    assert not folder.exists("objects/a.bin")
    folder.write("objects/a.bin", b"one")
    assert folder.exists("objects/a.bin")
    folder.write("objects/a.bin", b"two")
    assert folder.read("objects/a.bin") == b"two"


def test_create_writes_only_once(folder: Folder) -> None:
    assert folder.create("manifests/1.json", b"first")
    assert not folder.create("manifests/1.json", b"second")
    assert folder.read("manifests/1.json") == b"first"


def test_names_are_sorted_relative_and_filtered(folder: Folder) -> None:
    assert folder.names() == []
    assert folder.names("jobs/") == []
    for name in ("b", "a/2", "a/10", "a/x/y", "ab"):
        folder.write(name, b"")
    assert folder.names() == ["a/10", "a/2", "a/x/y", "ab", "b"]
    assert folder.names("a/") == ["a/10", "a/2", "a/x/y"]
    assert folder.names("a") == ["a/10", "a/2", "a/x/y", "ab"]
    assert folder.names("a/1") == ["a/10"]


def test_bytes_are_stored_as_they_are(folder: Folder) -> None:
    """Above all, a name such as x.gz must not make pyarrow compress or decompress."""
    data = bytes(range(256)) * 10
    for name in ("x.gz", "x.zst", "x.parquet"):
        folder.write(name, data)
        assert folder.read(name) == data


def test_delete(folder: Folder) -> None:
    folder.write("a", b"")
    folder.delete("a")
    assert folder.names() == []
    with pytest.raises(PhatgooseError, match=r"cannot delete .*pool/a"):
        folder.delete("a")
    folder.delete("a", missing_ok=True)
    folder.delete("no/such/folder", missing_ok=True)


def test_missing_file_is_named(folder: Folder) -> None:
    with pytest.raises(PhatgooseError, match=r"cannot read .*pool/jobs/a\.json") as raised:
        folder.read("jobs/a.json")
    assert "\n" not in str(raised.value)


def test_check_writable_leaves_nothing(folder: Folder) -> None:
    folder.check_writable()
    assert folder.names() == []


BAD_NAMES = ["", "/etc/x", "..", "../x", "a/../x", "a//b", "./a", ".a", "a/.b", "a/", "a\\b", "a\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_stay_inside_the_folder(folder: Folder, name: str) -> None:
    calls: list[Any] = [folder.read, folder.exists, folder.path, folder.local, folder.delete]
    calls += [lambda n: folder.write(n, b"x"), lambda n: folder.create(n, b"x")]
    for call in calls:
        with pytest.raises(PhatgooseError, match="is no file name in"):
            call(name)
    assert folder.names() == []


@given(name=st.text(st.sampled_from("./\\a\0"), max_size=6))
def test_every_accepted_name_is_below_the_folder(name: str) -> None:
    folder = Folder("/pool")
    try:
        path = folder.path(name)
    except PhatgooseError:
        return
    assert os.path.normpath(path) == path
    assert path.startswith("/pool/")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("pool", "./pool/", tmp_path / "pool", f"{tmp_path.as_uri()}/pool/"):
        folder = Folder(uri)
        assert folder.path("a/b") == f"{tmp_path}/pool/a/b"
        assert folder.local("a/b") == tmp_path / "pool/a/b"
    monkeypatch.chdir("/")
    Folder(tmp_path / "pool").write("a", b"x")
    assert (tmp_path / "pool/a").read_bytes() == b"x"

    remote = Folder("mock:///pool/one")
    assert remote.path("a/b") == "mock:///pool/one/a/b"
    assert remote.local("a/b") is None


def test_spaces_in_paths(tmp_path: Path) -> None:
    Folder(tmp_path / "a b%20").write("x", b"1")
    assert Folder((tmp_path / "a b%20").as_uri()).read("x") == b"1"


def test_options_stay_at_the_end_and_secrets_are_not_shown() -> None:
    folder = Folder("s3://key:secret@bucket/pool?region=eu-west-1&endpoint_override=localhost:1")
    assert folder.path("a").startswith("s3://key:secret@bucket/pool/a?region=")
    assert str(folder) == "s3://bucket/pool"
    with pytest.raises(PhatgooseError, match=r"in s3://bucket/pool:"):
        folder.path("../a")


def test_unknown_filesystem() -> None:
    with pytest.raises(PhatgooseError, match="cannot open the folder nowhere://a/b"):
        Folder("nowhere://user:secret@a/b")


def test_a_folder_travels_to_another_process(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(Folder(tmp_path)))
    folder.write("a", b"x")
    assert folder.read("a") == b"x"


def test_a_killed_writer_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a write at its last moment and skip the cleaning up, as kill -9 does."""
    folder = Folder(tmp_path)
    folder.write("jobs/a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            folder.write("jobs/a", b"new")
    assert len(list((tmp_path / "jobs").iterdir())) == 2  # the file and what was left behind
    assert folder.names() == ["jobs/a"]
    assert folder.read("jobs/a") == b"old"


@pytest.mark.parametrize(
    ("number", "mend"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "choose a folder")]
)
def test_refused_writes_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, mend: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    folder = Folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", refuse)
        for call in (folder.write, folder.create):
            with pytest.raises(
                PhatgooseError, match=rf"{tmp_path}/a \({os.strerror(number)}.*{mend}"
            ):
                call("a", b"x")
        with pytest.raises(PhatgooseError, match=mend):
            folder.check_writable()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("not a folder")
    with pytest.raises(PhatgooseError, match=rf"{tmp_path}/pool"):
        Folder(tmp_path / "pool").check_writable()
