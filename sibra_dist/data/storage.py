"""Folders on any file system that Arrow reaches: a disk, an object store, HDFS.

A `Place` is a folder, and a file in it is named relative to it, with forward slashes. Where disks and object stores
differ, what both can do is what there is: a file is written whole or not at all, and nothing is moved or altered in place.

Object stores are reached as their own tools reach them. For `s3://` (and `s3a://`, its name in Hadoop) the environment may
say AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION, and the credentials. What stands in a URI is
taken as it is, without percent-decoding, as Spark takes it.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Union

import pyarrow as pa
from pyarrow import fs

from sibra_dist.errors import DatasetError

OBJECT_STORES = ("s3", "gcs")
"""Arrow's names of the file systems on which a file appears when its upload is complete."""
DELETED_AT_ONCE = 16
Content = Union[bytes, "pa.Buffer", Iterator[memoryview]]
"""Of a file: whole, or piece by piece."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE = re.compile(r"^file:(//)?(?=/(?!/))")  # Java writes file:/a


@dataclass(frozen=True)
class Place:
    """A folder, which may not exist yet. Every `OSError` that a method raises names the file's URI."""

    uri: str
    """An absolute path where it is local, else a URI without a slash at its end."""

    @classmethod
    def at(cls, place: Union[str, Path, "Place"]) -> "Place":
        """The folder that a path, or a URI, names; a relative path is made absolute.

        Raises:
            DatasetError: a URI of a kind that is not known here.
        """
        if isinstance(place, Place):
            return place
        given = _FILE.sub("", str(place))
        if not _SCHEME.match(given):
            return cls(str(Path(given).resolve()))
        scheme, _, rest = given.partition("://")
        _opener(given)
        return cls(f"{scheme}://{rest.rstrip('/')}")

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.uri.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of this machine's file system."""
        return not _SCHEME.match(self.uri)

    @property
    def path(self) -> Path:
        """The folder, where it is local."""
        if not self.is_local:
            raise ValueError(f"{self} is no path of this machine")
        return Path(self.uri)

    def read(self, name: str) -> bytes:
        """The content of file `name`; `FileNotFoundError` if there is none."""
        with _told(self / name), self.open(name) as file:
            content: bytes = file.read()
            return content

    def open(self, name: str) -> pa.NativeFile:
        """File `name`, to be read here and there."""
        with _told(self / name):
            system, path = filesystem(f"{self / name}")
            return system.open_input_file(path)

    def stream(self, name: str) -> pa.NativeFile:
        """File `name`, to be read from its start; what is compressed stays so."""
        with _told(self / name):
            system, path = filesystem(f"{self / name}")
            return system.open_input_stream(path, compression=None)

    def write(self, name: str, content: Content) -> None:
        """Make `content` file `name`, in place of one that is there: whole and durable, or else not at all.

        Content in pieces that are made meanwhile is the exception: where making one raises, an object store keeps what came
        before it.
        """
        with _told(self / name):
            if self.is_local:
                target = self.path / name
                _make_folder(target.parent)
                write_atomically(target, content)
                return
            system, path = filesystem(f"{self / name}")
            if system.type_name in OBJECT_STORES:
                _upload(system, path, content)
            else:
                _write_aside(system, path, content)

    def status(self, name: str) -> tuple[int, int] | None:
        """Bytes of file `name`, and when it was last modified, in nanoseconds; None if there is no such file."""
        with _told(self / name):
            system, path = filesystem(f"{self / name}")
            about = system.get_file_info(path)
            return (about.size, about.mtime_ns or 0) if about.type == fs.FileType.File else None

    def files(self, below: str = "") -> list[str]:
        """Names of all files in the folder, or in its folder `below`, at any depth, in order; none if it does not exist."""
        with _told(self / below if below else self):
            system, root = filesystem(self.uri)
            root = root.rstrip("/")
            selector = fs.FileSelector(f"{root}/{below}".rstrip("/") or "/", allow_not_found=True, recursive=True)
            try:
                found = system.get_file_info(selector)
            except NotADirectoryError:
                return []
            return sorted(about.path[len(root) + 1 :] for about in found if about.type == fs.FileType.File)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, and the folders in this one that are empty then; a file that is not there is no error."""
        delete = self._delete_local if self.is_local else self._delete_remote
        with ThreadPoolExecutor(DELETED_AT_ONCE) as pool:
            list(pool.map(delete, names))  # so that what goes wrong is raised

    def delete_all(self) -> None:
        """Delete the folder with everything in it; one that is not there is no error."""
        with _told(self):
            if self.is_local:
                if self.path.exists():
                    shutil.rmtree(self.path)
                return
            system, path = filesystem(self.uri)
            if system.type_name in OBJECT_STORES:  # which hold files, and at most a mark where a folder is meant
                system.delete_dir_contents(path, missing_dir_ok=True)
            elif system.get_file_info(path).type != fs.FileType.NotFound:
                system.delete_dir(path)

    def _delete_local(self, name: str) -> None:
        with _told(self / name):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path / name).parents:
            if folder == self.path:
                break
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()

    def _delete_remote(self, name: str) -> None:
        with suppress(FileNotFoundError), _told(self / name):
            system, path = filesystem(f"{self / name}")
            system.delete_file(path)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Arrow's file system for a path or URI, one for all of this process, and the path in it.

    Raises:
        DatasetError: a URI of a kind that is not known here.
        OSError: the file system cannot be reached.
    """
    uri = _FILE.sub("", uri)
    if not _SCHEME.match(uri):
        return fs.LocalFileSystem(), uri
    return _opener(uri)(uri.partition("://")[2])


def write_atomically(path: Path, content: Content) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, even after a power cut."""
    # Two processes may write the same file at once.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("wb") as file:
            file.writelines(_pieces(content))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _sync(path.parent)


def _opener(uri: str) -> Callable[[str], tuple[fs.FileSystem, str]]:
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise DatasetError(f"{uri} names a file system that is not known here. Give a path, or a URI of file:///, {known}")
    if scheme != "hdfs" and not rest.partition("/")[0]:
        raise DatasetError(f"{uri} names no bucket. Write {scheme}://BUCKET/FOLDER")
    return SCHEMES[scheme]


def _open_s3(rest: str) -> tuple[fs.FileSystem, str]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _s3(rest.partition("/")[0], endpoint, region), rest


def _open_hdfs(rest: str) -> tuple[fs.FileSystem, str]:
    authority, _, path = rest.partition("/")
    return _hdfs(authority), f"/{path}"


@lru_cache
def _s3(bucket: str, endpoint: str | None, region: str | None) -> fs.FileSystem:
    scheme, _, host = endpoint.rstrip("/").rpartition("://") if endpoint else ("", "", None)
    if region is None:
        # Asked of AWS itself, where it is AWS; other stores have no regions, but a signature has to name one.
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    # Uploads begin with their first request (no `allow_delayed_open`): one that cannot begin has no stream that could,
    # when it is destroyed, put an empty object in the place of the old one.
    return fs.S3FileSystem(
        region=region, endpoint_override=host, scheme=scheme or "https", connect_timeout=10, request_timeout=60
    )


@lru_cache
def _gs() -> fs.FileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(minutes=1))


@lru_cache
def _hdfs(authority: str) -> fs.FileSystem:
    # "default": the one that Hadoop's own settings name.
    return fs.FileSystem.from_uri(f"hdfs://{authority}/")[0] if authority else fs.HadoopFileSystem("default")


SCHEMES: dict[str, Callable[[str], tuple[fs.FileSystem, str]]] = {
    "s3": _open_s3,
    "s3a": _open_s3,
    "gs": lambda rest: (_gs(), rest),
    "hdfs": _open_hdfs,
}
"""The file system of a URI and the path in it, given what follows `://`, by scheme."""


def _upload(system: fs.FileSystem, path: str, content: Content) -> None:
    """Write an object. Arrow completes an upload when its stream is closed, by an exception too, with what was written."""

    def upload() -> None:
        stream = system.open_output_stream(path, compression=None)
        for piece in _pieces(content):
            stream.write(piece)
        stream.close()

    # Signals interrupt the main thread, so none can come between opening the stream and writing it all.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(upload).result()


def _write_aside(system: fs.FileSystem, path: str, content: Content) -> None:
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
    system.create_dir(folder, recursive=True)
    try:
        with system.open_output_stream(aside, compression=None) as file:
            for piece in _pieces(content):
                file.write(piece)
        # HDFS renames onto nothing, so for a moment there is neither the old file nor the new one.
        if system.get_file_info(path).type == fs.FileType.File:
            system.delete_file(path)
        system.move(aside, path)
    finally:
        if system.get_file_info(aside).type == fs.FileType.File:
            system.delete_file(aside)


def _pieces(content: Content) -> Iterable[bytes | pa.Buffer | memoryview]:
    return [content] if isinstance(content, bytes | pa.Buffer) else content


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _told(place: Place) -> Iterator[None]:
    """Give every trouble of a file system one form: an `OSError` with a number, a reason and the URI."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place)) from error
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
        # Where Arrow has more to say than a line, it is about every place in which it looked for a library.
        raise OSError(number or errno.EIO, str(reason or error).partition("\n")[0], str(place)) from error
