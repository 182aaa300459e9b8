"""The files of a table: which ones its paths stand for, and what is in them by checksum.

A path of the configuration is a file, a glob, or several of them, on this machine or on any file system that Arrow
reaches. From here on it is a list of absolute paths and URIs.
"""

import fnmatch
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs
from pyspark.errors import AnalysisException
from pyspark.logger import PySparkLogger
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, MapType, StructType, VariantType

from sibra_dist.data.manifest import Source
from sibra_dist.data.storage import filesystem
from sibra_dist.errors import DatasetError, SourceError, nearest
from sibra_dist.etl.config import PrepareConfig, TableConfig
from sibra_dist.etl.reading import BLOCK, each, open_stream, reading, shortened, unreadable_files

ASKED_OF_SPARK = ("table", "query")
"""Formats that are no files."""
HASHED_BY_DRIVER = 1 << 30
"""Bytes of input that the driver hashes by itself; more is left to Spark's tasks."""


@dataclass(frozen=True)
class Files:
    """The files of one table, in the order of their names, without repetition. Its text is how messages name the table."""

    table: TableConfig
    uris: tuple[str, ...]
    """Of each file, its absolute path, or its URI where it is not on this machine; none for formats `table` and `query`."""
    names: tuple[str, ...]
    """Of each file, its path relative to the source folder where it lies in it; for `table` and `query`, what it is."""

    def __str__(self) -> str:
        kind = f"{self.table.format} " if self.table.format in ASKED_OF_SPARK else ""
        return kind + shortened(", ".join(_paths(self.table)))

    @property
    def first(self) -> str:
        """Where the first file lies, or else what the table is."""
        return self.uris[0] if self.uris else str(self)

    @property
    def statement(self) -> str:
        """The name of a `table`, or the SQL of a `query`."""
        return _paths(self.table)[0]

    def inputs(self) -> list[tuple[str, str]]:
        """URI and name of every file that is read: those of the table, and those of the ids beside an `npy`."""
        pairs = list(zip(self.uris, self.names, strict=False))
        if self.table.format == "npy":
            pairs += [(ids_beside(uri), ids_beside(name)) for uri, name in pairs]
        return pairs


def ids_beside(matrix: str) -> str:
    """The file of the ids that belong to the rows of an `npy` file."""
    return f"{os.path.splitext(matrix)[0]}.ids"


def find_files(config: PrepareConfig, table: TableConfig) -> Files:
    """The files that a table's path or paths stand for, on this machine or elsewhere.

    `*`, `?` and `[...]` mean what they mean in a shell. They match no name that begins with a dot or an underscore, as of
    files that other programs leave beside data (`_SUCCESS`), unless they are written after that letter. A path that exists
    as it is written is no pattern, and neither is the source folder.

    Raises:
        SourceError: there is no such file, it cannot be opened, or its file system cannot be reached.
    """
    paths = _paths(table)
    if table.format in ASKED_OF_SPARK:
        if len(paths) != 1:
            raise SourceError(f"format {table.format} reads one {table.format}, not {len(paths)}; give one as path")
        return Files(table, (), (f"table {paths[0]}" if table.format == "table" else "query",))
    root = _absolute(config.source)
    found: dict[str, str] = {}
    for path in paths:
        located = _local(config.located(path))
        try:
            kinds = _matching(root, _local(path))
            if not kinds:
                raise SourceError(f"there is no file {located}; {nearest(located.rpartition('/')[2], _siblings(root, path))}")
            _check_files(kinds, path)
            if table.format == "npy":
                _check_ids(list(kinds))
        except DatasetError as error:
            raise SourceError(str(error)) from error
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{located} cannot be read: {shortened(str(error))}") from error
        found |= {uri: uri.removeprefix(f"{root.rstrip('/')}/") for uri in kinds}
    pairs = sorted(found.items(), key=lambda pair: pair[::-1])
    return Files(table, tuple(uri for uri, _ in pairs), tuple(name for _, name in pairs))


def fingerprints(spark: SparkSession, tables: Iterable[Files]) -> tuple[Source, ...]:
    """Size and checksum of every input, once each, in the order of their names.

    Of a table or query that Spark knows, `sha256` is that of its schema, the number of its rows and the sum of their hashes,
    so that the order of the rows does not count; `bytes` is 0.

    Raises:
        SourceError: one cannot be read.
    """
    tables = list(tables)
    named = {uri: name for files in tables for uri, name in files.inputs()}
    uris = list(named)
    with unreadable_files():
        if sum(each(_size, uris)) <= HASHED_BY_DRIVER:
            found = each(_digest, uris)
        else:
            found = spark.sparkContext.parallelize(uris, len(uris)).map(_digest).collect()
        sources = [Source(path=named[uri], bytes=size, sha256=digest) for uri, (size, digest) in zip(uris, found, strict=True)]
        asked = {(files.names[0], files.statement): files for files in tables if not files.uris}
        sources += [_content(spark, files) for files in asked.values()]
    return tuple(sorted(sources, key=lambda source: (source.path, source.sha256)))


def frame_of(spark: SparkSession, files: Files) -> DataFrame:
    """The rows of a table that Spark knows, or of a query, which can do nothing but select.

    Raises:
        SourceError: Spark knows no such table or column, or the query is no SQL.
    """
    # Spark would print its own error in JSON, a screen long, before ours.
    logger = PySparkLogger.getLogger("SQLQueryContextLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        if files.table.format == "table":
            return spark.table(files.statement)
        # In brackets nothing but a query is SQL, so that none can alter or delete what is there.
        return spark.sql(f"SELECT * FROM (\n{files.statement.strip().rstrip(';')}\n)")
    except AnalysisException as error:
        reason = re.sub(r"^\[\S+\] | SQLSTATE: .*", "", str(error).strip().splitlines()[0])
        raise SourceError(f"{files} cannot be read: {reason}") from error
    finally:
        logger.setLevel(level)


def _paths(table: TableConfig) -> tuple[str, ...]:
    return (table.path,) if isinstance(table.path, str) else table.path


def _local(path: str) -> str:
    return path.removeprefix("file://")


def _absolute(folder: str) -> str:
    """A folder as an absolute path or a URI. A link stays one, so that files are named by the way that leads to them."""
    local = _local(folder)
    return local if "://" in local else os.path.abspath(local)


def _beside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _based(root: str, path: str) -> tuple[str, str]:
    """The folder or bucket that a path begins in, and the rest of the path."""
    if "://" in path:
        scheme, _, rest = path.partition("://")
        bucket, _, rest = rest.partition("/")
        return f"{scheme}://{bucket}", rest
    return ("/", path.lstrip("/")) if path.startswith("/") else (root, path)


def _matching(root: str, path: str) -> dict[str, fs.FileType]:
    """Everything that is there for a path, by the letter or else as a pattern, and what it is."""
    base, rest = _based(root, path)
    found = _kinds([_beside(base, rest)])
    if found or not _is_pattern(rest):
        return found
    found = {base: fs.FileType.Directory}
    for segment in rest.split("/"):
        folders = [uri for uri, kind in found.items() if kind == fs.FileType.Directory]
        if _is_pattern(segment):
            found = {uri: kind for folder in folders for uri, kind in _children(folder, segment).items()}
        else:
            found = _kinds([_beside(folder, segment) for folder in folders])
    return found


def _is_pattern(text: str) -> bool:
    return any(letter in text for letter in "*?[")


def _children(folder: str, pattern: str) -> dict[str, fs.FileType]:
    """What a folder holds under names of a pattern."""
    system, path = filesystem(folder)
    listed = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    hidden = tuple(letter for letter in "._" if not pattern.startswith(letter))
    matching = [about for about in listed if fnmatch.fnmatchcase(about.base_name, pattern)]
    return {_beside(folder, about.base_name): about.type for about in matching if not about.base_name.startswith(hidden)}


def _kinds(uris: Sequence[str]) -> dict[str, fs.FileType]:
    """What each path is; those that are not there are left out. All are of one file system."""
    uris = [uri if "://" in uri else os.path.normpath(uri) for uri in uris]
    if not uris:
        return {}
    system, _ = filesystem(uris[0])
    listed = system.get_file_info([filesystem(uri)[1] for uri in uris])
    return {uri: about.type for uri, about in zip(uris, listed, strict=True) if about.type != fs.FileType.NotFound}


def _check_files(kinds: dict[str, fs.FileType], path: str) -> None:
    for uri, kind in kinds.items():
        if kind == fs.FileType.Directory:
            raise SourceError(f"{uri} is a folder; name the files in it, for example {path}/*")
        if "://" not in uri:
            try:
                Path(uri).open("rb").close()
            except OSError as error:
                raise SourceError(f"{uri} cannot be read: {error.strerror}") from error


def _check_ids(matrices: Sequence[str]) -> None:
    there = _kinds([ids_beside(uri) for uri in matrices])
    for uri in matrices:
        if ids_beside(uri) not in there:
            raise SourceError(f"there is no file {ids_beside(uri)} beside {uri}: write the ids of its rows into it, one a line")


def _siblings(root: str, path: str) -> list[str]:
    """Names of files where a path should have been."""
    base, rest = _based(root, _local(path))
    return [uri.rpartition("/")[2] for uri in _children(_beside(base, rest.rpartition("/")[0]), "*")]


def _size(uri: str) -> int:
    system, path = filesystem(uri)
    return int(system.get_file_info(path).size or 0)


def _digest(uri: str) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    size, digest = 0, hashlib.sha256()
    with reading(uri), open_stream(uri) as stream:
        while block := stream.read(BLOCK):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()


def _content(spark: SparkSession, files: Files) -> Source:
    """The fingerprint of the rows of a table or query."""
    frame = frame_of(spark, files)
    schema = frame.schema.json()
    # Two columns may have one name.
    frame = frame.toDF(*[str(place) for place in range(len(frame.columns))])
    fields = [F.col(field.name) if _hashes(field.dataType) else F.to_json(F.struct(field.name)) for field in frame.schema]
    # A null leaves Spark's hash as it was, so whether there is one is hashed too.
    row = F.xxhash64(F.lit(0), *[part for field in fields for part in (field, field.isNull())])
    counted = frame.agg(F.count("*"), F.sum(row.cast("decimal(20,0)"))).first()
    assert counted is not None
    digest = hashlib.sha256(f"{schema} {counted[0]} {counted[1]}".encode()).hexdigest()
    return Source(path=files.names[0], bytes=0, sha256=digest)


def _hashes(kind: DataType) -> bool:
    """Whether Spark hashes values of a type, as it does unless there are maps in it."""
    if isinstance(kind, StructType):
        return all(_hashes(field.dataType) for field in kind)
    if isinstance(kind, ArrayType):
        return _hashes(kind.elementType)
    return not isinstance(kind, MapType | VariantType)
