"""What every place can do, whatever file system it is on."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs

import sibra_dist
from sibra_dist.data import storage
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from tests.object_store import ObjectStore

LARGE = bytes(range(256)) * (11 << 12)
"""11 MiB: an object store is given it in two parts."""


@pytest.fixture(params=["local", "s3", "s3a", "folders"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "local":
        return Place.at(tmp_path / "some" / "folder")
    if request.param == "folders":
        # In place of HDFS, which needs a cluster: a remote file system that has folders and can rename.
        system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
        monkeypatch.setitem(storage.SCHEMES, "hdfs", lambda rest: (system, rest))
        return Place.at("hdfs://cluster/some/folder")
    bucket: str = request.getfixturevalue("s3")
    return Place.at(f"{request.param}{bucket.removeprefix('s3')}/some/folder/")


@pytest.mark.parametrize(
    "content", [b"", b"short", LARGE, pa.py_buffer(b"a buffer")], ids=["empty", "short", "large", "buffer"]
)
def test_what_is_written_is_read(place: Place, content: bytes | pa.Buffer) -> None:
    place.write("a/b.bin", content)
    whole = bytes(content)
    assert place.read("a/b.bin") == whole
    with place.open("a/b.bin") as file:
        assert file.size() == len(whole)
        file.seek(len(whole) // 2)
        assert file.read() == whole[len(whole) // 2 :]
    with place.stream("a/b.bin") as file:
        assert file.read() == whole


def test_what_is_compressed_stays_so(place: Place) -> None:
    compressed = pa.compress(b"content" * 100, codec="gzip", asbytes=True)
    place.write("table.tsv.gz", compressed)
    assert place.read("table.tsv.gz") == compressed
    with place.stream("table.tsv.gz") as file:
        assert file.read() == compressed


def test_overwriting_replaces_the_whole_content(place: Place) -> None:
    place.write("a.bin", LARGE)
    place.write("a.bin", b"new")
    assert place.read("a.bin") == b"new"
    assert place.files() == ["a.bin"]


def test_files_are_told_by_name_in_order(place: Place) -> None:
    names = ["b/x.bin", "a/c/y 1%20.bin", "top.bin", "ab/z.bin", "a/d.bin"]
    for name in names:
        place.write(name, b"1")
    assert place.files() == sorted(names)
    assert place.files("a") == (place / "").files("a") == ["a/c/y 1%20.bin", "a/d.bin"]
    assert (place / "a").files() == ["c/y 1%20.bin", "d.bin"]
    assert place.read("a/c/y 1%20.bin") == b"1"


def test_there_is_nothing_in_a_folder_that_does_not_exist(place: Place) -> None:
    assert place.files() == []
    place.write("a.bin", b"1")
    assert place.files("b") == place.files("a.bin") == []


def test_status_is_size_and_modification_time(place: Place) -> None:
    place.write("a/b.bin", b"12345")
    status = place.status("a/b.bin")
    assert status is not None
    assert status[0] == 5
    assert status[1] > 1_700_000_000_000_000_000
    assert place.status("a/b.bin") == status
    assert place.status("a/c.bin") is None
    assert place.status("a") is None
    assert place.status("a/b.bin/c") is None


@pytest.mark.parametrize("read", [Place.read, Place.open, Place.stream], ids=["read", "open", "stream"])
@pytest.mark.parametrize("name", ["absent.bin", "a.bin/absent.bin"])
def test_file_that_is_not_there_is_told(place: Place, read: Callable[[Place, str], object], name: str) -> None:
    place.write("a.bin", b"1")
    with pytest.raises(FileNotFoundError, match="No such file or directory") as told:
        read(place, name)
    assert told.value.filename == f"{place}/{name}"


def test_deleting_takes_the_named_files_only(place: Place) -> None:
    for name in ("a/b/c.bin", "a/d.bin", "e.bin", "f/g.bin"):
        place.write(name, b"1")
    place.delete(["a/b/c.bin", "f/g.bin", "absent.bin", "a/absent/too.bin"])
    assert place.files() == ["a/d.bin", "e.bin"]
    place.delete(place.files())
    assert place.files() == []


def test_folders_that_are_empty_go_with_their_last_file(tmp_path: Path) -> None:
    place = Place.at(tmp_path / "folder")
    place.write("a/b/c.bin", b"1")
    place.write("a/d.bin", b"1")
    place.delete(["a/b/c.bin"])
    assert [path.name for path in (tmp_path / "folder" / "a").iterdir()] == ["d.bin"]
    place.delete(["a/d.bin"])
    assert list((tmp_path / "folder").iterdir()) == []


def test_deleting_all_leaves_what_is_beside(place: Place) -> None:
    place.write("a/b.bin", b"1")
    beside = Place(f"{place}-2")
    beside.write("c.bin", b"1")
    place.delete_all()
    assert place.files() == []
    assert beside.files() == ["c.bin"]
    place.delete_all()


def test_deleting_all_of_a_bucket_leaves_the_bucket(s3: str) -> None:
    place = Place.at(s3)
    place.write("a/b.bin", b"1")
    place.delete_all()
    assert place.files() == []
    place.write("a/b.bin", b"2")
    assert place.read("a/b.bin") == b"2"


def test_a_place_travels_between_processes(place: Place) -> None:
    assert pickle.loads(pickle.dumps(place)) == place
    assert Place.at(str(place)) == Place.at(place) == place
    assert len({place, Place.at(str(place))}) == 1


def test_local_paths_are_absolute_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("x/y", Path("x/y"), "x/../x/y/", f"file://{tmp_path}/x/y", f"file:{tmp_path}/x/y"):
        place = Place.at(given)
        assert (str(place), place.is_local, place.path) == (f"{tmp_path}/x/y", True, tmp_path / "x" / "y")
    assert str(Place.at("/") / "a") == "/a"


@pytest.mark.parametrize(
    "given", ["s3://bucket/key/", "s3a://bucket/key", "gs://bucket/key", "hdfs://host:8020/key", "hdfs:///key"]
)
def test_uris_are_kept_as_given(given: str) -> None:
    place = Place.at(given)
    assert str(place) == given.rstrip("/")
    assert str(place / "a/b") == f"{given.rstrip('/')}/a/b"
    assert not place.is_local
    with pytest.raises(ValueError, match="is no path of this machine"):
        _ = place.path


@pytest.mark.parametrize("given", ["wasb://a/b", "file://host/a", "https://a/b"])
def test_file_system_that_is_not_known_is_told_with_those_that_are(given: str) -> None:
    with pytest.raises(
        DatasetError, match=r"is not known here. Give a path, or a URI of file:///, s3://, s3a://, gs://, hdfs://"
    ):
        Place.at(given)


@pytest.mark.parametrize("given", ["s3://", "s3:///key", "gs://"])
def test_uri_without_a_bucket_is_told(given: str) -> None:
    with pytest.raises(DatasetError, match=r"names no bucket. Write (s3|gs)://BUCKET/FOLDER"):
        Place.at(given)


def test_failed_write_to_a_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.at(tmp_path)
    place.write("a/b.bin", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for name in ("a/b.bin", "a/c.bin"):
        with pytest.raises(OSError, match="No space left on device") as told:
            place.write(name, b"new")
        assert told.value.filename == f"{tmp_path}/{name}"
    assert place.files() == ["a/b.bin"]
    assert place.read("a/b.bin") == b"old"


def start_writer(place: Place) -> "subprocess.Popen[str]":
    """A process that writes LARGE to `a.bin` once it is told to.

    Not this one: Arrow closes an abandoned stream while it holds the interpreter, so that a server here could not answer.
    """
    code = f"""
import signal
import sys
from sibra_dist.data.storage import Place
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
input()
try:
    Place.at(sys.argv[1]).write("a.bin", bytes(range(256)) * {len(LARGE) // 256})
except OSError as error:
    sys.exit(str(error))
"""
    command = [sys.executable, "-c", code, str(place)]
    pipe, folder = subprocess.PIPE, Path(sibra_dist.__file__).parents[1]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=folder)


@pytest.mark.parametrize("before", [["a.bin"], []], ids=["replacing", "new"])
@pytest.mark.parametrize("at", ["?uploads", "partNumber=1&", "partNumber=2&", "?uploadId="])
def test_failed_upload_leaves_what_was_there(s3: str, object_store: ObjectStore, before: list[str], at: str) -> None:
    place = Place.at(s3) / "folder"
    for name in before:
        place.write(name, b"old")
    with start_writer(place) as writer:
        object_store.answer = lambda request: "403 Forbidden" if at in request else None
        _, told = writer.communicate("go\n")
    assert writer.returncode == 1
    assert re.fullmatch(rf"\[Errno 5\] When .* AWS Error ACCESS_DENIED .*: '{s3}/folder/a.bin'\n", told)
    object_store.answer = None
    assert place.files() == before
    assert [place.read(name) for name in before] == [b"old" for _ in before]


@pytest.mark.parametrize("at", ["?uploads", "partNumber=2&", "?uploadId="])
def test_interrupted_upload_leaves_nothing_half_done(s3: str, object_store: ObjectStore, at: str) -> None:
    place = Place.at(s3)
    place.write("a.bin", b"old")
    with start_writer(place) as writer:

        def interrupt(request: str) -> None:
            if at in request:
                writer.send_signal(signal.SIGINT)

        object_store.answer = interrupt
        _, told = writer.communicate("go\n")
    assert writer.returncode == -signal.SIGINT
    assert told.endswith("KeyboardInterrupt\n")
    assert place.read("a.bin") in (b"old", LARGE)


def test_failed_renaming_leaves_no_file_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setitem(storage.SCHEMES, "hdfs", lambda rest: (system, rest))
    place = Place.at("hdfs://cluster/folder")
    place.write("a/b.bin", b"1")
    with pytest.raises(OSError, match="directory"):
        place.write("a", b"a folder is in the way")
    assert place.files() == ["a/b.bin"]


def test_bucket_that_is_not_there_is_told(s3: str) -> None:
    place = Place.at("s3://absent-bucket/folder")
    assert place.files() == []
    with pytest.raises(FileNotFoundError, match="absent-bucket"):
        place.read("a.bin")
    with pytest.raises(OSError, match=r"NO_SUCH_BUCKET.*s3://absent-bucket/folder/a.bin"):
        place.write("a.bin", b"1")


def test_what_may_not_be_read_is_told(s3: str, object_store: ObjectStore) -> None:
    place = Place.at(s3)
    place.write("manifest.json", b"{}")
    object_store.answer = lambda request: "403 Forbidden"
    for attempt in (lambda: place.read("manifest.json"), lambda: place.status("manifest.json"), place.files):
        with pytest.raises(OSError, match=f"ACCESS_DENIED.*{s3}"):
            attempt()
    with pytest.raises(DatasetError, match=f"{s3}/manifest.json cannot be read: .*ACCESS_DENIED"):
        Manifest.read(s3)


def test_a_store_that_is_named_is_not_looked_up(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(bucket: str) -> str:
        raise AssertionError("asked the network for a region")

    monkeypatch.setattr(fs, "resolve_s3_region", ask)
    Place.at(s3).write("a.bin", b"1")
    assert Place.at(s3).read("a.bin") == b"1"
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    system, path = storage.filesystem(f"{s3}/a.bin")
    assert system.region == "eu-central-1"
    assert system.get_file_info(path).size == 1


def test_endpoint_of_s3_alone_comes_first(s3: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.environment["AWS_ENDPOINT_URL"] + "/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    Place.at(s3).write("a.bin", b"1")
    assert Place.at(s3).files() == ["a.bin"]


def test_one_client_serves_a_process(s3: str) -> None:
    assert storage.filesystem(f"{s3}/a")[0] is storage.filesystem(f"{s3}/b")[0]
