"""Opening the files of a source, here or in a task of Spark, and telling why one cannot be read."""

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException

from sibra_dist.data.storage import filesystem
from sibra_dist.errors import DatasetError, SourceError

BLOCK = 1 << 22
"""Bytes that are read at once."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""How a file of text is compressed, by the end of its name."""
AT_ONCE = 16
"""Files that the driver looks into at the same time."""
SHOWN = 200
"""Characters of a query, a reason or a list of paths that a message shows."""
STORE_TROUBLE = re.compile(r"AWS Error|google::cloud|HDFS")
"""What Arrow says where an object store, and not the content of a file, is the trouble."""

Result = TypeVar("Result")


def open_stream(uri: str, unpack: bool = False) -> pa.NativeFile:
    """A file, to be read from its start; `unpack` decompresses it as the end of its name says."""
    system, path = filesystem(uri)
    return system.open_input_stream(path, compression=compression_of(uri) if unpack else None, buffer_size=BLOCK)


def open_file(uri: str) -> pa.NativeFile:
    """A file, to be read here and there."""
    system, path = filesystem(uri)
    return system.open_input_file(path)


def compression_of(uri: str) -> str | None:
    """Arrow's name of how a file is compressed, by the end of its name; None for one that is not."""
    return COMPRESSIONS.get(os.path.splitext(uri)[1].lower())


def each(function: Callable[[str], Result], uris: Sequence[str]) -> list[Result]:
    """The function of each file, of several at a time, since most of it is waiting."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, uris))


def shortened(text: str) -> str:
    """A text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]} ..."


def damaged(uri: str, reason: str) -> SourceError:
    """The error that tells of a file that is not what it was."""
    return SourceError(f"{uri} cannot be read: it is damaged ({shortened(reason).rstrip('.')}). Fetch it again")


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn whatever stops the reading of a file into a `SourceError`, in the driver and in Spark's Python workers.

    Raises:
        SourceError: it is not there, or may not be read, or is damaged.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise _not_there(uri) from error
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None or STORE_TROUBLE.search(str(error)):
            raise SourceError(f"{uri} cannot be read: {shortened(str(error))}") from error
        raise damaged(uri, str(error) or type(error).__name__) from error


@contextmanager
def unreadable_files() -> Iterator[None]:
    """Turn Spark's word that a task cannot read a file into ours.

    Raises:
        SourceError, DatasetError: the file, the reason and what to do.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        text = str(error)
        for kind in (SourceError, DatasetError):
            ours = re.search(rf"{kind.__module__}\.{kind.__name__}: (.+)", text)
            if ours is not None:
                raise kind(ours[1]) from error
        gone = re.search(r"\[PATH_NOT_FOUND\] [^:]*: (\S+?)\.\s", text)
        if gone is not None:
            raise _not_there(_ours(gone[1])) from error
        told = re.search(r"\[FAILED_READ_FILE\S*\] .*?reading file (\S+?)\.\s+(.*?)\s*SQLSTATE", text, re.DOTALL)
        if told is None:
            raise
        causes = re.findall(r"Caused by: [\w.$]+: (.+)", text)
        reason = told[2] or (causes[-1] if causes else "Spark makes nothing of it")
        raise damaged(_ours(told[1]), reason) from error


def _not_there(uri: str) -> SourceError:
    return SourceError(f"{uri} is not there where it is read: every machine must find it under that path")


def _ours(uri: str) -> str:
    """A file as we name it, from Spark's name of it."""
    return re.sub("^file:/+", "/", unquote(uri))
