"""Readers: the files of a table to one frame of records, nothing lost.

Every reader gives the columns

    file    string   the file that the record stands in, as `Source.path` names it
    record  string   the record's text; null where the format has none, and then `values` is what there is to show
    fault   string   why the record cannot be read; null for a readable one
    values  struct   the wanted columns; of text formats all strings
"""

import codecs
import glob
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import arrow_udf

from sibra_dist.data.manifest import Source, sha256_of
from sibra_dist.errors import SourceError, nearest
from sibra_dist.etl.config import FeatureTableConfig, InteractionsConfig, PrepareConfig, TableConfig

TAB = "\t"
NPZ_COLUMNS = ("ids", "vectors")
UNDECODABLE = "not in the encoding of the table"
WRONG_FIELDS = "wrong number of fields"

AnyTable = InteractionsConfig | FeatureTableConfig


@dataclass(frozen=True)
class Files:
    """The files of one table, in the order of their names."""

    table: TableConfig
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    """Of each file, its path relative to the source folder where it lies in it."""


def read_table(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    """The records of a table, with the wanted `columns` in `values`.

    Raises:
        SourceError: a file cannot be read, or lacks a column.
    """
    require_columns(files.paths[0], column_names(files), columns)
    return READERS[files.table.format].read(spark, files, columns)


def column_names(files: Files) -> list[str]:
    """The columns of a table.

    Raises:
        SourceError: a file cannot be read, or has other columns than the rest.
    """
    return READERS[files.table.format].columns(files)


def find_files(config: PrepareConfig, table: TableConfig) -> Files:
    """The files that a table's path stands for.

    Raises:
        SourceError: there is none, or it cannot be opened, or it does not lie in a file system of this machine.
    """
    located = config.located(table).removeprefix("file://")
    if "://" in located:
        raise SourceError(f"{located} is not on a file system of this machine; copy or mount it here and give its path")
    root = Path(config.source.removeprefix("file://")).resolve()
    pattern = table.path.removeprefix("file://")
    # Only the table's own path may be a pattern: a bracket in the name of the source folder is a bracket.
    found = [pattern] if (root / pattern).exists() else sorted(glob.glob(pattern, root_dir=root))
    paths = tuple((root / path).resolve() for path in found)
    if not paths:
        siblings = sorted(path.name for path in Path(located).parent.iterdir()) if Path(located).parent.is_dir() else []
        raise SourceError(f"there is no file {located}; {nearest(Path(located).name, siblings)}")
    for path in paths:
        if path.is_dir():
            raise SourceError(f"{path} is a folder; name the files in it, for example {table.path}/*")
        try:
            path.open("rb").close()
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return Files(table, paths, tuple(str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in paths))


def fingerprints(tables: Iterable[Files]) -> tuple[Source, ...]:
    """Size and checksum of every input file, once each, in the order of their names."""
    found = {name: path for files in tables for name, path in zip(files.names, files.paths, strict=True)}
    return tuple(Source(path=name, bytes=path.stat().st_size, sha256=sha256_of(path)) for name, path in sorted(found.items()))


def delimited_columns(files: Files) -> list[str]:
    """The configured names, or those in the first line."""
    header = files.table.header
    return list(header) if isinstance(header, tuple) else _first_line(files).split(files.table.separator)


def read_delimited(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    """Lines of fields. A line equal to the heading is a heading wherever it stands; an empty line is no record."""
    heading = None if isinstance(files.table.header, tuple) else _first_line(files)
    return _read_lines(spark, files, columns, delimited_columns(files), heading, files.table.separator)


def atomic_columns(files: Files) -> list[str]:
    """The names in the first line, without their types."""
    return [name.partition(":")[0] for name in _first_line(files).split(TAB)]


def read_atomic(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    """RecBole's atomic files: fields between tabs, under a heading of `name:type`."""
    return _read_lines(spark, files, columns, atomic_columns(files), _first_line(files), TAB)


def parquet_columns(files: Files) -> list[str]:
    """The columns of the first file, once every file is seen to have them."""
    names = []
    for path in files.paths:
        try:
            names.append(pq.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path} cannot be read as Parquet: {error}") from error
        require_columns(path, names[-1], names[0])
    return list(names[0])


def read_parquet(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    """Parquet files, which keep the types of their columns."""
    frame = spark.read.parquet(*_escaped(files.paths))
    values = F.struct(*[F.col(f"`{name}`") for name in columns])
    nothing = F.lit(None).cast("string")
    return frame.select(_file_name(frame, files), nothing.alias("record"), nothing.alias("fault"), values.alias("values"))


def npz_columns(files: Files) -> list[str]:
    """The names of the two arrays that every archive has."""
    for path in files.paths:
        try:
            with np.load(path, allow_pickle=False) as archive:
                require_columns(path, archive.files, NPZ_COLUMNS)
        except (OSError, ValueError, AttributeError) as error:
            raise SourceError(f"{path} cannot be read as an npz archive: {error}") from error
    return list(NPZ_COLUMNS)


def read_npz(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    """NumPy archives of an array `ids` and a matrix `vectors` with a row for each."""
    tables = []
    for path, name in zip(files.paths, files.names, strict=True):
        try:
            with np.load(path, allow_pickle=False) as archive:
                ids, vectors = archive["ids"], archive["vectors"]
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} cannot be read as an npz archive: {error}") from error
        if ids.ndim != 1 or vectors.ndim != 2 or len(ids) != len(vectors):
            raise SourceError(f"{path}: ids must be n values and vectors n rows, not {ids.shape} and {vectors.shape}")
        rows = pa.array(list(vectors.astype(np.float32)), pa.list_(pa.float32()))
        tables.append(pa.table({"file": [name] * len(ids), "ids": pa.array(ids.tolist()), "vectors": rows}))
    nothing = F.lit(None).cast("string")
    frame = spark.createDataFrame(pa.concat_tables(tables, promote_options="permissive"))
    return frame.select("file", nothing.alias("record"), nothing.alias("fault"), F.struct(*columns).alias("values"))


class Reader(NamedTuple):
    """How a format is read."""

    columns: Callable[[Files], list[str]]
    """The columns of a table's files."""
    read: Callable[[SparkSession, Files, Sequence[str]], DataFrame]
    """The records, with the wanted columns, all of which are there."""


READERS: dict[str, Reader] = {
    "delimited": Reader(delimited_columns, read_delimited),
    "atomic": Reader(atomic_columns, read_atomic),
    "parquet": Reader(parquet_columns, read_parquet),
    "npz": Reader(npz_columns, read_npz),
}


def pattern_of(separator: str) -> str:
    """The regular expression that stands for a separator by the letter, in the form that Java splits at without one."""
    return "".join(letter if letter.isalnum() else "\\" + letter for letter in separator)


def require_columns(path: Path, there: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that each of the `wanted` columns of a file is `there` once.

    Raises:
        SourceError: one is not, with the columns that are, and the nearest.
    """
    for name in wanted:
        if there.count(name) > 1:
            raise SourceError(f"{path} has {there.count(name)} columns {name}; rename all but one")
        if name not in there:
            raise SourceError(f"{path} has no column {name}, only {', '.join(there)}; {nearest(name, there)}")


def _read_lines(
    spark: SparkSession, files: Files, columns: Sequence[str], names: Sequence[str], heading: str | None, separator: str
) -> DataFrame:
    frame = spark.read.option("lineSep", "\n").text(_escaped(files.paths))
    decoded, shown = [F.rtrim(text, F.lit("\r")) for text in _decoded(F.col("value"), files.table.encoding)]
    lines = frame.select(_file_name(frame, files), decoded.alias("text"), shown.alias("record")).where(F.col("record") != "")
    if heading is not None:
        lines = lines.where(F.col("record") != heading)
    # -1 keeps empty fields at the end.
    fields = F.split("text", pattern_of(separator), -1)
    fault = F.when(F.col("text").isNull(), UNDECODABLE).when(F.size(fields) != len(names), WRONG_FIELDS)
    values = F.struct(*[F.get(fields, names.index(name)).alias(name) for name in columns])
    return lines.select("file", "record", fault.alias("fault"), values.alias("values"))


def _decoded(line: Column, encoding: str) -> tuple[Column, Column]:
    """A line as text, null where it is none, and a text to show for it in any case."""
    # Spark's text source hands on the bytes as they are, under the name of a string.
    codec = codecs.lookup(encoding).name
    if codec == "utf-8":
        return F.try_validate_utf8(line), F.make_valid_utf8(line)
    if codec == "iso8859-1":
        text = F.decode(line.cast("binary"), "ISO-8859-1")
        return text, text

    def decode(content: bytes) -> str | None:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            return None

    def decode_lines(lines: pa.Array) -> pa.Array:
        return pa.array([decode(line) for line in lines.to_pylist()], pa.string())

    def show_lines(lines: pa.Array) -> pa.Array:
        return pa.array([line.decode(encoding, "replace") for line in lines.to_pylist()], pa.string())

    # Spark's stubs ask for a function type that it takes from the type hints.
    text = arrow_udf(decode_lines, "string")  # type: ignore[call-overload]
    shown = arrow_udf(show_lines, "string")  # type: ignore[call-overload]
    return text(line.cast("binary")), shown(line.cast("binary"))


def _first_line(files: Files) -> str:
    """The first line, which must be the same in every file of the table."""
    lines = [_read_first_line(path, files.table.encoding) for path in files.paths]
    for path, line in zip(files.paths, lines, strict=True):
        if not line:
            raise SourceError(f"{path} has an empty first line, which should name its columns")
        if line != lines[0]:
            raise SourceError(f"{path} has other columns than {files.paths[0]}: {line!r}, not {lines[0]!r}")
    return lines[0]


def _read_first_line(path: Path, encoding: str) -> str:
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as stream:
            # A byte order mark is no part of the first name; Spark leaves it out too.
            return stream.readline().removeprefix(codecs.BOM_UTF8).decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not {encoding} text: {error}. Set encoding to what it is, as latin-1") from error
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


def _escaped(paths: Iterable[Path]) -> list[str]:
    """Paths that Spark takes by the letter, though it reads *, ? and brackets in a path as a pattern."""
    return [re.sub(r"([\\*?\[\]{}])", r"\\\1", str(path)) for path in paths]


def _file_name(frame: DataFrame, files: Files) -> Column:
    """The column `file`: our name for the file that Spark read a row from."""
    names = {str(path): name for path, name in zip(files.paths, files.names, strict=True)}
    # Spark names a local file file:///... in one place and file:/... in the other.
    uris = [uri.replace("file:///", "file:/", 1) for uri in frame.inputFiles()]
    pairs = [F.lit(text) for uri in uris for text in (uri, names[unquote(uri.removeprefix("file:"))])]
    return F.create_map(*pairs)[F.col("_metadata.file_path")].alias("file")
