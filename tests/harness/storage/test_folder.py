import errno
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from harness.storage import Folder, object_store, stores
from phatgoose.errors import PhatgooseError
from tests.support import processes
from tests.support.s3_server import KEYS, S3Server, s3_server
from tests.support.small_disk import small_disk


@pytest.fixture(params=["path", "uri", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Return an empty folder: local by path, by URI, in memory, and on an S3-compatible server."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return Folder(server.uri(f"{tmp_path.name}/pool"))
    uris: dict[str, str | Path] = {
        "path": tmp_path / "pool",
        "uri": f"{tmp_path.as_uri()}/pool",
        "memory": "memory:///pool",
    }
    return Folder(uris[request.param])


def test_a_file_can_be_written_read_and_overwritten(folder: Folder) -> None:
    assert not folder.exists("objects/a.bin")
    folder.write("objects/a.bin", b"one")
    assert folder.exists("objects/a.bin")
    folder.write("objects/a.bin", b"two")
    assert folder.read("objects/a.bin") == b"two"


@pytest.mark.parametrize("size", [0, 1, 11 * 2**20])
def test_a_large_file_is_written_and_read_in_pieces(
    folder: Folder, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_CHUNK_BYTES", 5 * 2**20)  # the least that S3 takes
    data = bytes(range(251)) * (size // 251 + 1)
    pieces = [data[:size][start : start + 3 * 2**20] for start in range(0, size, 3 * 2**20)]
    folder.write("packs/large", b"older")
    folder.write_chunks("packs/large", iter(pieces))
    found = list(folder.read_chunks("packs/large"))
    assert b"".join(found) == data[:size]
    if not folder.uri.startswith("memory:"):
        assert max(map(len, found), default=0) < max(size, 2)
    assert folder.names() == ["packs/large"]
    with pytest.raises(PhatgooseError, match=r"cannot read .*packs/nothing"):
        list(folder.read_chunks("packs/nothing"))


def test_an_error_while_a_large_file_is_written_leaves_the_older_one(folder: Folder) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"one"
        raise OSError("the disk that it is read from fails")

    folder.write("packs/large", b"older")
    with pytest.raises(PhatgooseError, match=r"cannot write .*packs/large"):
        folder.write_chunks("packs/large", pieces())
    assert folder.read("packs/large") == b"older"
    assert [entry.path for entry in folder.entries(hidden=True)] == ["packs/large"]


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


def test_bytes_are_stored_unchanged(folder: Folder) -> None:
    """Check that pyarrow does not compress or decompress names such as x.gz."""
    data = bytes(range(256)) * 10
    for name in ("x.gz", "x.zst", "x.parquet"):
        folder.write(name, data)
        assert folder.read(name) == data


def test_delete_removes_a_file(folder: Folder) -> None:
    folder.write("a", b"")
    folder.delete("a")
    assert folder.names() == []
    with pytest.raises(PhatgooseError, match=r"cannot delete .*pool/a"):
        folder.delete("a")
    folder.delete("a", missing_ok=True)
    folder.delete("no/such/folder", missing_ok=True)


def test_a_missing_file_is_named(folder: Folder) -> None:
    with pytest.raises(PhatgooseError, match=r"cannot read .*pool/jobs/a\.json") as raised:
        folder.read("jobs/a.json")
    assert "\n" not in str(raised.value)


def test_check_writable_leaves_nothing(folder: Folder) -> None:
    folder.check_writable()
    assert folder.names() == []


BAD_NAMES = ["", "/etc/x", "..", "../x", "a/../x", "a//b", "./a", ".a", "a/.b", "a/", "a\\b", "a\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_cannot_leave_the_folder(folder: Folder, name: str) -> None:
    calls: list[Any] = [folder.read, folder.exists, folder.path, folder.local, folder.delete]
    calls += [lambda n: folder.write(n, b"x"), lambda n: folder.create(n, b"x")]
    for call in calls:
        with pytest.raises(PhatgooseError, match="is not a file name in"):
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


def test_paths_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("pool", "./pool/", tmp_path / "pool", f"{tmp_path.as_uri()}/pool/"):
        folder = Folder(uri)
        assert folder.path("a/b") == f"{tmp_path}/pool/a/b"
        assert folder.local("a/b") == tmp_path / "pool/a/b"
    monkeypatch.chdir("/")
    Folder(tmp_path / "pool").write("a", b"x")
    assert (tmp_path / "pool/a").read_bytes() == b"x"

    remote = Folder("memory:///pool/one")
    assert remote.path("a/b") == "memory:///pool/one/a/b"
    assert remote.local("a/b") is None


def test_paths_may_contain_spaces(tmp_path: Path) -> None:
    Folder(tmp_path / "a b%20").write("x", b"1")
    assert Folder((tmp_path / "a b%20").as_uri()).read("x") == b"1"


def test_options_stay_at_the_end_and_secrets_are_hidden() -> None:
    folder = Folder("s3://key:secret@bucket/pool?region=eu-west-1&endpoint_override=localhost:1")
    assert folder.path("a").startswith("s3://key:secret@bucket/pool/a?region=")
    assert str(folder) == "s3://bucket/pool"
    with pytest.raises(PhatgooseError, match=r"in s3://bucket/pool\."):
        folder.path("../a")


def test_an_unknown_filesystem_is_refused() -> None:
    with pytest.raises(PhatgooseError, match="cannot open the folder nowhere://a/b"):
        Folder("nowhere://user:secret@a/b")


def test_a_folder_can_be_sent_to_another_process(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(Folder(tmp_path)))
    folder.write("a", b"x")
    assert folder.read("a") == b"x"


def test_a_killed_writer_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a write at its last moment and skip the cleanup, like kill -9."""
    folder = Folder(tmp_path)
    folder.write("jobs/a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            folder.write("jobs/a", b"new")
    assert len(list((tmp_path / "jobs").iterdir())) == 2  # the file and the leftover
    assert folder.names() == ["jobs/a"]
    assert folder.read("jobs/a") == b"old"


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "choose a folder")]
)
def test_refused_writes_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    folder = Folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "fsync", refuse)
        for call in (folder.write, folder.create):
            with pytest.raises(
                PhatgooseError, match=rf"{tmp_path}/a \({os.strerror(number)}.*{fix}"
            ):
                call("a", b"x")
        with pytest.raises(PhatgooseError, match=fix):
            folder.check_writable()
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("not a folder")
    with pytest.raises(PhatgooseError, match=rf"{tmp_path}/pool"):
        Folder(tmp_path / "pool").check_writable()


def test_entries_have_size_and_time(folder: Folder) -> None:
    before = time.time()
    folder.write("a/b", b"12345")
    [entry] = folder.entries("a/")
    assert (entry.path, entry.size) == ("a/b", 5)
    assert before - 2 < entry.modified < time.time() + 2


def test_many_files_are_found_in_order(folder: Folder) -> None:
    names = [f"jobs/{number}" for number in range(40)]
    for name in names[:-1]:
        folder.write(name, name.encode())
    expected = [(name, name.encode()) for name in names[:-1]]
    assert list(folder.find_all(names)) == [*expected, (names[-1], None)]
    [(_, error)] = folder.find_all(["../a"])
    assert isinstance(error, PhatgooseError)


def test_the_root_of_a_bucket_is_a_folder(s3: S3Server) -> None:
    s3.make_bucket("whole")
    folder = Folder(s3.uri("", "whole"))
    folder.write("a/b", b"1")
    assert folder.names() == ["a/b"]
    assert Folder(s3.uri("a", "whole")).names() == ["b"]
    assert Folder(s3.uri("", "whole")).read("a/b") == b"1"


def test_a_listing_includes_all_pages(s3: S3Server, tmp_path: Path) -> None:
    folder = Folder(s3.uri(tmp_path.name))
    names = [f"jobs/{number:05}" for number in range(1100)]
    for name in names:
        folder.write(name, b"")
    assert folder.names("jobs/") == names


def _create_all(uri: str, mine: bytes, made: Any) -> None:
    folder = Folder(uri)
    made.put([name for name in map(str, range(30)) if folder.create(name, mine)])


@pytest.mark.parametrize("place", ["local", "s3"])
def test_only_one_of_many_creators_makes_the_file(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uri = str(tmp_path)
    if place == "s3":
        uri = request.getfixturevalue("s3").uri(tmp_path.name)
    made = processes.CONTEXT.Queue()
    calls = [(uri, b"%d" % number, made) for number in range(4)]
    creators = processes.start(_create_all, *calls)
    makers = [name for _ in creators for name in made.get(timeout=120)]
    for creator in creators:
        creator.join(60)
    assert sorted(makers) == sorted(map(str, range(30)))
    assert Folder(uri).names() == sorted(map(str, range(30)))


def test_a_store_without_conditional_writes_is_refused_immediately(tmp_path: Path) -> None:
    with s3_server({"TEST_S3_WITHOUT_CONDITIONS": "1"}) as server:
        folder = Folder(server.uri(tmp_path.name))
        with pytest.raises(PhatgooseError, match=r"overwrites existing files .*If-None-Match"):
            folder.check_writable()
        assert folder.names() == []
        folder.check_writable(creates=False)
        assert folder.names() == []


def test_other_filesystems_can_hold_results_but_not_a_registry() -> None:
    folder = Folder("mock:///pool")  # pyarrow's in-memory filesystem
    folder.write("a/b", b"1")
    assert (folder.read("a/b"), folder.names(), folder.exists("a")) == (b"1", ["a/b"], False)
    folder.check_writable(creates=False)
    folder.delete("a/b")
    with pytest.raises(PhatgooseError, match=r"cannot create mock:///pool/check-.*registry in a"):
        folder.check_writable()


def test_credentials_and_options_of_a_uri_are_used(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder(s3.uri("one")).write("a", b"1")
    by_environment = f"s3://bucket/one?endpoint_override={s3.place}&scheme=http"
    assert Folder(by_environment).read("a") == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3.place}")
    assert Folder("s3://bucket/one").read("a") == b"1"
    for name in KEYS:
        monkeypatch.delenv(name)
    profile = tmp_path / "credentials"
    profile.write_text("[mine]\naws_access_key_id = me\naws_secret_access_key = a%b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert Folder("s3://bucket/one").read("a") == b"1"
    assert Folder("s3://key:s%2Fcret@bucket/one").read("a") == b"1"
    assert pickle.loads(pickle.dumps(Folder("s3://key:secret@bucket/one"))).read("a") == b"1"
    with pytest.raises(PhatgooseError, match=r"unknown options regoin .known: endpoint_override"):
        Folder("s3://bucket/one?regoin=x")
    with pytest.raises(PhatgooseError, match="it names no bucket"):
        Folder("s3:///one")


def test_a_missing_bucket_is_refused(s3: S3Server) -> None:
    folder = Folder(s3.uri("pool", "nowhere"))
    with pytest.raises(PhatgooseError, match=r"cannot create s3://nowhere/pool/check-") as raised:
        folder.check_writable()
    assert "\n" not in str(raised.value)


def test_other_object_stores_open_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    for uri in ("gs://anonymous@bucket/a", "gs://anonymous@bucket/a?endpoint_override=localhost:1&"
                "scheme=http", "az://container/a"):  # fmt: skip
        assert Folder(uri).local("x") is None


def test_a_link_succeeds_if_only_its_reply_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Link like a network filesystem, which repeats a link if no reply arrives."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    folder = Folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "link", twice)
        assert folder.create("a", b"mine")
        assert not folder.create("a", b"other")
    assert folder.read("a") == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "1m") as disk:
        yield disk


def test_a_full_disk_leaves_the_previous_content(small: Path) -> None:
    folder = Folder(small / "pool")
    folder.write("a", b"earlier")
    for call in (folder.write, folder.create):
        with pytest.raises(
            PhatgooseError,
            match=rf"^cannot (write|create) {small}/pool/[ab] \(No space left.*\): free some",
        ):
            call("a" if call == folder.write else "b", bytes(2**21))
    assert folder.read("a") == b"earlier"
    assert [path.name for path in (small / "pool").iterdir()] == ["a"]
    assert folder.create("b", b"later")


def test_a_part_of_a_file_can_be_read(folder: Folder) -> None:
    folder.write("objects/a.bin", b"0123456789")
    assert folder.read_part("objects/a.bin", 0, 10) == b"0123456789"
    assert folder.read_part("objects/a.bin", 7, 3) == b"789"
    assert folder.read_part("objects/a.bin", 10, 0) == b""
    wanted = [("objects/a.bin", i, 2) for i in range(9)]
    assert list(folder.read_parts(wanted)) == [b"0123456789"[i : i + 2] for i in range(9)]
    for start in (8, 10):
        with pytest.raises(PhatgooseError, match=r"cannot read .*objects/a\.bin"):
            folder.read_part("objects/a.bin", start, 3)
    with pytest.raises(PhatgooseError, match=r"cannot read .*objects/b\.bin"):
        folder.read_part("objects/b.bin", 0, 1)


def test_a_part_of_a_file_of_a_pyarrow_filesystem_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    store = stores.ArrowStore(fs.LocalFileSystem())
    assert store.read_part(f"{tmp_path}/a.bin", 7, 2) == b"78"
