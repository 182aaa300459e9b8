"""Matrices of NumPy and the ids of their rows: `npz` archives, and `npy` files with the ids in a text file beside them.

The driver looks at headers only. What they announce is read by Spark's tasks, block by block.
"""

import codecs
import io
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, FloatType, LongType, StringType, StructField, StructType

from sibra_dist.errors import SourceError
from sibra_dist.etl.files import Files, ids_beside
from sibra_dist.etl.frames import Opened, arrow_frame, require_columns
from sibra_dist.etl.lines import UNDECODABLE
from sibra_dist.etl.reading import BLOCK, each, open_file, open_stream, reading, shortened

NPZ_COLUMNS = ("ids", "vectors")
"""The columns of a table of arrays; in an archive the names of the two."""
ROWS = 1 << 14
"""Rows of a block at the most."""

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]


class Header(NamedTuple):
    """What an array says of itself before it begins."""

    shape: tuple[int, ...]
    by_columns: bool
    """Whether it stands column by column, as Fortran has it."""
    dtype: np.dtype[np.generic]


def open_npz(spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """NumPy archives of an array `ids`, of whole numbers or texts, and a matrix `vectors` with a row for each.

    Raises:
        SourceError: a file is anything else.
    """
    headers = each(_archive_headers, files.uris)
    for uri, (ids, vectors) in zip(files.uris, headers, strict=True):
        if len(ids.shape) != 1 or len(vectors.shape) != 2 or ids.shape[0] != vectors.shape[0]:
            raise SourceError(f"{uri}: ids must be n values and vectors n rows, not {ids.shape} and {vectors.shape}")
        if ids.dtype.kind not in "iuUS":
            raise SourceError(f"{uri}: ids must be whole numbers or text, not {ids.dtype}; save ids.astype(str)")
        _check_numbers(uri, vectors)
    # A number beyond 63 bits is an id like any other, as text.
    numbers = all(np.can_cast(ids.dtype, np.int64) for ids, _ in headers)
    read = partial(_read_archive, numbers=numbers, encoding=files.table.encoding)
    return Opened(list(NPZ_COLUMNS), lambda columns: _frame(arrow_frame(spark, files, read, _schema(numbers)), columns))


def open_npy(spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """NumPy files of a matrix, each beside a text file whose lines are the ids of the rows.

    Raises:
        SourceError: a file is no matrix of numbers.
    """
    for uri, header in zip(files.uris, each(_matrix_header, files.uris), strict=True):
        if len(header.shape) != 2:
            raise SourceError(f"{uri} must be a matrix with a row for each id, not an array of shape {header.shape}")
        _check_numbers(uri, header)
    read = partial(_read_matrix, encoding=files.table.encoding)
    return Opened(list(NPZ_COLUMNS), lambda columns: _frame(arrow_frame(spark, files, read, _schema(numbers=False)), columns))


def _archive_headers(uri: str) -> tuple[Header, Header]:
    try:
        with _archive(uri) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            require_columns(uri, names, NPZ_COLUMNS)
            with archive.open("ids.npy") as ids, archive.open("vectors.npy") as vectors:
                return _header(ids), _header(vectors)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise SourceError(f"{uri} cannot be read as an npz archive: {shortened(str(error))}") from error


def _matrix_header(uri: str) -> Header:
    try:
        with open_stream(uri) as stream:
            return _header(stream)
    except (OSError, ValueError) as error:
        raise SourceError(f"{uri} cannot be read as an npy file: {shortened(str(error))}") from error


def _check_numbers(uri: str, vectors: Header) -> None:
    if vectors.dtype.kind not in "fiub":
        raise SourceError(f"{uri}: vectors must be numbers, not {vectors.dtype}")


@contextmanager
def _archive(uri: str) -> Iterator[zipfile.ZipFile]:
    with open_file(uri) as file, zipfile.ZipFile(file) as archive:
        yield archive


def _header(stream: IO[bytes]) -> Header:
    """Read the header, after which the values follow."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return Header(*np.lib.format.read_array_header_1_0(stream))
    if version == (2, 0):
        return Header(*np.lib.format.read_array_header_2_0(stream))
    raise ValueError(f"version {version} of the npy format holds no plain numbers or texts")


def _read_archive(uri: str, numbers: bool, encoding: str) -> Iterator[pa.RecordBatch]:
    with _archive(uri) as archive, archive.open("ids.npy") as ids, archive.open("vectors.npy") as vectors:
        values = iter(np.lib.format.read_array(ids).tolist())
        for block in _blocks(vectors):
            yield _batch(list(itertools.islice(values, len(block))), block, numbers, encoding)


def _read_matrix(uri: str, encoding: str) -> Iterator[pa.RecordBatch]:
    beside = ids_beside(uri)
    with open_stream(uri) as stream, reading(beside), io.BufferedReader(open_stream(beside)) as lines:
        blocks, mark = _blocks(stream, None if "://" in uri else uri), codecs.BOM_UTF8
        while True:
            with reading(uri):
                block = next(blocks, None)
            if block is None:
                break
            ids = [line.rstrip(b"\r\n") for line in itertools.islice(lines, len(block))]
            if len(ids) < len(block):
                raise SourceError(f"{beside} has fewer ids than {uri} has rows")
            ids[0] = ids[0].removeprefix(mark)
            mark = b""
            yield _batch(ids, block, False, encoding)
        if any(line.rstrip(b"\r\n") for line in lines):
            raise SourceError(f"{beside} has more ids than {uri} has rows")


def _blocks(stream: IO[bytes], path: str | None = None) -> Iterator[Matrix]:
    """The rows of a matrix, several at a time; `path` is where it lies by itself on this machine, if it does."""
    header = _header(stream)
    rows, width = header.shape
    size = width * header.dtype.itemsize
    at_once = min(ROWS, max(1, BLOCK // max(1, size)))
    whole: np.ndarray[tuple[int, int], np.dtype[np.generic]] | None = None
    if header.by_columns:
        # Each row lies all over the file. What cannot be mapped must be held.
        held = path is None or not size
        whole = np.frombuffer(_read(stream, rows * size), header.dtype) if held else np.load(str(path), mmap_mode="r")
        whole = whole.reshape((rows, width), order="F")
    for start in range(0, rows, at_once):
        number = min(at_once, rows - start)
        if whole is None:
            block = np.frombuffer(_read(stream, number * size), header.dtype).reshape(number, width)
        else:
            block = whole[start : start + number]
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is told as no finite number
            yield block.astype(np.float32)


def _read(stream: IO[bytes], size: int) -> bytes:
    """So many bytes, which a stream may give in several parts."""
    parts = []
    while size:
        part = stream.read(size)
        if not part:
            raise EOFError("it ends before its last row")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _batch(ids: Sequence[int | str | bytes], vectors: Matrix, numbers: bool, encoding: str) -> pa.RecordBatch:
    """The columns of `_schema`, a row for each of a matrix."""
    count, width = vectors.shape
    texts = [None if numbers else _text(value, encoding) for value in ids]
    wrong = [not numbers and text is None for text in texts]
    shown = [value.decode(encoding, "replace") if isinstance(value, bytes) else str(value) for value in ids]
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * width)
    columns = {
        "record": pa.array([text if bad else None for bad, text in zip(wrong, shown, strict=True)], pa.string()),
        "fault": pa.array([UNDECODABLE if bad else None for bad in wrong], pa.string()),
        "ids": pa.array(ids, pa.int64()) if numbers else pa.array(texts, pa.string()),
        "vectors": pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel(), pa.float32())),
    }
    return pa.RecordBatch.from_pydict(columns)


def _text(value: int | str | bytes, encoding: str) -> str | None:
    try:
        return value.decode(encoding) if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        return None


def _schema(numbers: bool) -> StructType:
    fields = [("record", StringType()), ("fault", StringType()), ("ids", LongType() if numbers else StringType())]
    return StructType([StructField(name, kind) for name, kind in [*fields, ("vectors", ArrayType(FloatType()))]])


def _frame(rows: DataFrame, columns: Sequence[str]) -> DataFrame:
    return rows.select("file", "record", "fault", F.struct(*columns).alias("values"))
