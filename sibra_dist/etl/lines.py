"""The lines of text files: every line that holds something, decoded, and known by its text where it cannot be."""

import codecs
import io
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.types import BinaryType, StructField, StructType

from sibra_dist.errors import SourceError
from sibra_dist.etl.files import Files
from sibra_dist.etl.frames import arrow_frame, file_column, spark_paths, strict_reader
from sibra_dist.etl.reading import BLOCK, compression_of, open_stream, reading

UNDECODABLE = "not in the encoding of the table"
LONGEST_LOOKED_AT = 1 << 24
"""Bytes of a line that the driver looks at."""
LONGEST = 1 << 28
"""Bytes of a line, more than which no line has that is text."""
TRUSTED_TO_SPARK = (".gz", ".zst")
"""Compressed text that Spark reads whole or not at all. Of bzip2 it skips a damaged block, and it knows another lz4."""
PACKED = (".zip", ".xz", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".z", ".lzma", ".lzo", ".snappy", ".deflate", ".br")


def read_lines(spark: SparkSession, files: Files) -> DataFrame:
    """Columns `file`, `text` (null where the line cannot be decoded), `record` (in any case a text to show).

    Lines end in a line feed, before which there may be a carriage return, or with the file. Empty ones are left out, and so
    is the byte order mark before the first.

    Raises:
        SourceError: a file is packed in a way that is not read here.
    """
    for uri in files.uris:
        _check_packing(uri)
    paths = spark_paths(spark, files) if all(_trusts_spark(uri) for uri in files.uris) else None
    if paths is not None:
        lines = strict_reader(spark).option("lineSep", "\n").text(paths).select(file_column(files), "value")
    else:
        schema = StructType([StructField("value", BinaryType())])
        lines = arrow_frame(spark, files, stream_lines, schema).withColumn("value", F.col("value").cast("string"))
    text, shown = [F.rtrim(column, F.lit("\r")) for column in _decoded(F.col("value"), files.table.encoding)]
    lines = lines.select("file", text.alias("text"), F.coalesce(text, shown).alias("record"))
    return lines.where(F.col("record") != "")


def stream_lines(uri: str) -> Iterator[pa.RecordBatch]:
    """The lines of a file as batches of a column of bytes.

    Raises:
        SourceError: a line has no end.
    """
    with open_stream(uri, unpack=True) as stream:
        start, rest = codecs.BOM_UTF8, b""
        while block := stream.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            if len(rest) > LONGEST:
                raise SourceError(f"{uri} has a line of more than {LONGEST} bytes: it is no text, or packed and not named so")
            if lines:
                lines[0] = lines[0].removeprefix(start)
                start = b""
                yield _batch(lines)
        if rest:
            yield _batch([rest.removeprefix(start)])


def first_lines(uri: str, number: int) -> list[bytes]:
    """The first lines of a file, as many as there are up to `number`, without line ends and byte order mark.

    Raises:
        SourceError: the file cannot be read.
    """
    _check_packing(uri)
    lines: list[bytes] = []
    with reading(uri), io.BufferedReader(open_stream(uri, unpack=True)) as stream:
        while len(lines) < number and (line := stream.readline(LONGEST_LOOKED_AT)):
            lines.append(line.removesuffix(b"\n").rstrip(b"\r"))
    return [line if place else line.removeprefix(codecs.BOM_UTF8) for place, line in enumerate(lines)]


def _check_packing(uri: str) -> None:
    if uri.lower().endswith(PACKED):
        raise SourceError(f"{uri} is packed in a way that is not read here; unpack it, or pack it as .gz or .zst")


def _trusts_spark(uri: str) -> bool:
    return compression_of(uri) is None or uri.endswith(TRUSTED_TO_SPARK)


def _batch(lines: list[bytes]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(lines, pa.binary())], names=["value"])


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
