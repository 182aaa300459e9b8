"""How files come into a frame: by Spark's own readers, or else by Arrow in tasks of Spark, one task a file.

Spark's readers are faster and divide a file among tasks, so they read whatever they can be trusted with. What they skip
without a word, or cannot reach, goes through Arrow.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.readwriter import DataFrameReader
from pyspark.sql.types import StringType, StructField, StructType

from sibra_dist.errors import SourceError
from sibra_dist.etl.files import Files
from sibra_dist.etl.reading import reading

TOLD = 50
"""Columns that a message names."""
PLAIN = re.compile(r"(\w+:/)?[A-Za-z0-9_./=-]+")
"""Paths and URIs that look the same wherever they are written."""
HADOOP_SCHEMES = {"s3": "s3a"}
"""Hadoop's name of a file system, where it is another."""


class Opened(NamedTuple):
    """A table of which so much is known that it can be read."""

    columns: list[str]
    read: Callable[[Sequence[str]], DataFrame]
    """The records, with the named columns, which are all there, in `values`."""


def require_columns(where: str, there: Sequence[str], wanted: Iterable[str]) -> None:
    """Check that each of the `wanted` columns of a file or table is `there` once.

    Raises:
        SourceError: one is not, with the columns that are, and the nearest.
    """
    for name in wanted:
        if there.count(name) > 1:
            raise SourceError(f"{where} has {there.count(name)} columns {name}; rename all but one")
        if name not in there:
            told = ", ".join(there[:TOLD]) + (f" and {len(there) - TOLD} more" if len(there) > TOLD else "")
            close = difflib.get_close_matches(name, there, n=1)
            raise SourceError(
                f"{where} has no column {name}, only {told}" + "".join(f"; did you mean {word}?" for word in close)
            )


def spark_paths(spark: SparkSession, files: Files) -> list[str] | None:
    """The files as Spark's readers take them, or None if Spark would not read each of them, whole."""
    schemes = {uri.partition("://")[0] for uri in files.uris if "://" in uri}
    if not all(reaches(spark, HADOOP_SCHEMES.get(scheme, scheme)) for scheme in schemes):
        return None
    if any(_is_skipped(uri) for uri in files.uris):
        return None
    return [by_the_letter(of_hadoop(uri)) for uri in files.uris]


def strict_reader(spark: SparkSession) -> DataFrameReader:
    """Spark's reader, told to fail where a file is damaged or gone, whatever the settings of the cluster."""
    return spark.read.option("ignoreCorruptFiles", "false").option("ignoreMissingFiles", "false")


def file_column(files: Files) -> Column:
    """The column `file` of a frame that Spark's readers made: our name of the file that a row comes from."""
    if len(files.names) == 1:
        return F.lit(files.names[0]).alias("file")
    given = F.col("_metadata.file_path")
    folders = {uri.removesuffix(name): None for uri, name in zip(files.uris, files.names, strict=True) if uri != name}
    # Spark escapes what is special in a URI. A plus sign is not, but stands for a space where it is decoded.
    path = F.when(given.contains("%"), F.url_decode(F.replace(given, F.lit("+"), F.lit("%2B")))).otherwise(given)
    # Spark names a local file file:///... in one place and file:/... in the other.
    path = F.when(path.startswith("file:/"), F.concat(F.lit("/"), F.ltrim(F.substr(path, F.lit(6)), F.lit("/")))).otherwise(
        path
    )
    for ours, theirs in HADOOP_SCHEMES.items():
        if any(uri.startswith(f"{ours}://") for uri in files.uris):
            rest = F.substr(path, F.lit(len(theirs) + 1))
            path = F.when(path.startswith(f"{theirs}://"), F.concat(F.lit(ours), rest)).otherwise(path)
    if any(uri.startswith("hdfs:///") for uri in files.uris):
        # Spark writes out which machine that is.
        path = F.regexp_replace(path, "^hdfs://[^/]*/", "hdfs:///")
    for folder in folders:
        path = F.when(path.startswith(folder), F.substr(path, F.lit(len(folder) + 1))).otherwise(path)
    # All this is done for every row. Where nothing is special, and it seldom is, one comparison does.
    if folders and all(PLAIN.fullmatch(uri) for uri in files.uris):
        for folder in folders:
            for start in [of_hadoop(folder)] if "://" in folder else [f"file:{folder}", f"file://{folder}"]:
                path = F.when(given.startswith(start), F.substr(given, F.lit(len(start) + 1))).otherwise(path)
    return path.alias("file")


def arrow_frame(
    spark: SparkSession, files: Files, read: Callable[[str], Iterable[pa.RecordBatch]], schema: StructType
) -> DataFrame:
    """The column `file`, and those of `schema`, from the batches that `read` makes of each file in a task of its own.

    Args:
        spark: the session.
        files: what to read.
        read: from a path or URI to batches with the columns of `schema`, one after the other, so that a file of any size is
            read in little memory. It runs in Spark's Python workers.
        schema: the columns.
    """
    pairs = list(zip(files.uris, files.names, strict=True))

    def read_files(numbers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in numbers:
            for number in batch.column(0).to_pylist():
                uri, name = pairs[number]
                with reading(uri):
                    for content in read(uri):
                        names = pa.repeat(pa.scalar(name, pa.string()), content.num_rows)
                        yield pa.RecordBatch.from_arrays([names, *content.columns], names=["file", *content.schema.names])

    told = StructType([StructField("file", StringType()), *schema.fields])
    return spark.range(0, len(pairs), 1, len(pairs)).mapInArrow(read_files, told)


def nothing(name: str) -> Column:
    """A column of texts in which there is none."""
    return F.lit(None).cast("string").alias(name)


def column(name: str) -> Column:
    """The column of a name by the letter, whatever signs are in it."""
    return F.col(f"`{name.replace('`', '``')}`")


def reaches(spark: SparkSession, scheme: str) -> bool:
    """Whether Hadoop, by which Spark reads files, has a file system for URIs of a scheme."""
    try:
        spark._jvm.org.apache.hadoop.fs.FileSystem.getFileSystemClass(scheme, spark._jsc.hadoopConfiguration())  # type: ignore[union-attr]
    except Py4JJavaError:
        return False
    return True


def _is_skipped(uri: str) -> bool:
    """Whether Spark leaves out a file by its name, or stumbles over it."""
    path = uri.partition("://")[2] or uri
    return os.path.basename(path).startswith((".", "_")) or path.endswith("._COPYING_") or ":" in path.partition("/")[2]


def of_hadoop(uri: str) -> str:
    """A path or URI as Hadoop takes it, always with a scheme: a cluster's default need not be the machine's own."""
    if "://" not in uri:
        return f"file://{uri}"
    scheme, _, rest = uri.partition("://")
    return f"{HADOOP_SCHEMES.get(scheme, scheme)}://{rest}"


def by_the_letter(path: str) -> str:
    """A path for Spark to read, which takes *, ? and brackets for a pattern."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", path)
