"""Parquet and ORC files, whose columns keep their types."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import orc, types
from pyspark.errors import AnalysisException, PySparkTypeError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_type, to_arrow_schema
from pyspark.sql.types import StructField, StructType

from sibra_dist.errors import SourceError
from sibra_dist.etl.files import Files
from sibra_dist.etl.frames import Opened, arrow_frame, column, file_column, nothing, require_columns, spark_paths, strict_reader
from sibra_dist.etl.reading import each, open_file, shortened, unreadable_files

ROWS = 1 << 12
"""Rows that are read at once: a row may hold a vector of a thousand numbers."""


class Kind(NamedTuple):
    """A format of columns."""

    name: str
    """As messages call it, and in lower case Spark."""
    schema: Callable[[pa.NativeFile], pa.Schema]
    blocks: Callable[[pa.NativeFile, Sequence[str]], Iterator[pa.RecordBatch | pa.Table]]
    """The rows of a file, with columns of the names at least."""


def _parquet_blocks(file: pa.NativeFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(file).iter_batches(batch_size=ROWS, columns=list(columns))


def _orc_blocks(file: pa.NativeFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    content = orc.ORCFile(file)
    for number in range(content.nstripes):
        yield content.read_stripe(number, columns=list(columns))


def _orc_schema(file: pa.NativeFile) -> pa.Schema:
    return orc.ORCFile(file).schema


PARQUET = Kind("Parquet", pq.read_schema, _parquet_blocks)
ORC = Kind("ORC", _orc_schema, _orc_blocks)


def open_columnar(kind: Kind, spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """Parquet or ORC files, of which each has the columns of the first.

    Raises:
        SourceError: one is anything else, or lacks a column, or has it in another type.
    """
    schemas = each(partial(_schema, kind), files.uris)
    first = schemas[0]
    for uri, schema in zip(files.uris, schemas, strict=True):
        require_columns(uri, schema.names, first.names)
        for name in set(wanted) & set(first.names):
            ours, theirs = schema.field(name).type, first.field(name).type
            if ours != theirs:
                raise SourceError(f"{uri} has column {name} as {ours}, but {files.first} as {theirs}; write both as one type")
    return Opened(first.names, partial(_read, kind, spark, files, first))


def _schema(kind: Kind, uri: str) -> pa.Schema:
    try:
        with open_file(uri) as file:
            return kind.schema(file)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{uri} cannot be read as {kind.name}: {shortened(str(error))}") from error


def _read(kind: Kind, spark: SparkSession, files: Files, schema: pa.Schema, columns: Sequence[str]) -> DataFrame:
    paths = spark_paths(spark, files)
    if paths is not None:
        try:
            with unreadable_files():
                frame = strict_reader(spark).format(kind.name.lower()).load(paths)
                values = F.struct(*[column(name) for name in columns])
                return frame.select(file_column(files), nothing("record"), nothing("fault"), values.alias("values"))
        except AnalysisException:
            # Spark has no type for some that numpy and pandas write (float16, nanoseconds), whether they are wanted or not.
            pass
    fields = []
    for name in columns:
        try:
            fields.append(StructField(name, from_arrow_type(_plain(schema.field(name).type, kind))))
        except PySparkTypeError as error:
            refused = f"column {name} of {files.first} has type {schema.field(name).type}, which is not read here"
            raise SourceError(f"{refused}; write it as numbers, text or a timestamp") from error
    told = StructType([StructField("values", StructType(fields))])
    wanted = to_arrow_schema(StructType(fields), timezone="UTC")
    rows = arrow_frame(spark, files, partial(_blocks, kind, wanted), told)
    return rows.select("file", nothing("record"), nothing("fault"), "values")


def _blocks(kind: Kind, schema: pa.Schema, uri: str) -> Iterator[pa.RecordBatch]:
    """The rows of a file in the types that Spark has."""
    with open_file(uri) as file:
        for block in kind.blocks(file, schema.names):
            for batch in block.to_batches(ROWS) if isinstance(block, pa.Table) else [block]:
                # What Spark has no unit for, as the last of nine digits of a second, is cut off.
                arrays = [batch.column(field.name).cast(field.type, safe=False) for field in schema]
                yield pa.RecordBatch.from_arrays([pa.StructArray.from_arrays(arrays, fields=list(schema))], names=["values"])


def _plain(given: pa.DataType, kind: Kind) -> pa.DataType:
    """The type of Arrow nearest to the given one that Spark has too."""
    if types.is_list(given) or types.is_large_list(given) or types.is_fixed_size_list(given):
        return pa.list_(_plain(given.value_type, kind))
    if types.is_struct(given):
        return pa.struct([(field.name, _plain(field.type, kind)) for field in given])
    if types.is_dictionary(given):
        return _plain(given.value_type, kind)
    if types.is_timestamp(given) and given.tz is None and kind is ORC:
        return pa.timestamp("us", "UTC")  # ORC says no zone, and means UTC or does not know
    return PLAIN.get(given, given)


PLAIN = {
    pa.float16(): pa.float32(),
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.null(): pa.int32(),
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
    pa.date64(): pa.date32(),
}
"""Of types that Spark does not have, the nearest that it has."""
