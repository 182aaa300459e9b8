"""Readers: a table to one frame of records, nothing lost.

Every reader gives the columns

    file    string   the file that the record stands in, as `Source.path` names it
    record  string   the record's text; null where the format has none, and then `values` is what there is to show
    fault   string   why the record cannot be read; null for a readable one
    values  struct   the wanted columns; of text formats all strings
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.types import StringType, StructField, StructType

from sibra_dist.errors import SourceError
from sibra_dist.etl.arrays import NPZ_COLUMNS as NPZ_COLUMNS
from sibra_dist.etl.arrays import open_npy, open_npz
from sibra_dist.etl.columnar import ORC, PARQUET, open_columnar
from sibra_dist.etl.files import Files, frame_of
from sibra_dist.etl.frames import Opened, column, nothing
from sibra_dist.etl.frames import require_columns as require_columns
from sibra_dist.etl.lines import UNDECODABLE, first_lines, read_lines
from sibra_dist.etl.objects import NOT_AN_OBJECT, names_in, texts_of
from sibra_dist.etl.reading import each
from sibra_dist.etl.reading import unreadable_files as unreadable_files

TAB = "\t"
WRONG_FIELDS, WRONG_QUOTES = "wrong number of fields", "quotes do not match"
LOOKED_AT = 300
"""Lines of JSON that the driver looks at for the names of columns."""


def read_table(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    """The records of a table, with the wanted `columns` in `values`.

    Raises:
        SourceError: a file cannot be read, or lacks a column.
    """
    opened = READERS[files.table.format](spark, files, columns)
    require_columns(files.first, opened.columns, columns)
    return opened.read(columns)


def column_names(spark: SparkSession, files: Files, wanted: Sequence[str] = ()) -> list[str]:
    """The columns of a table. Of JSON those in its first lines, and of the `wanted` ones those in any line.

    Raises:
        SourceError: a file cannot be read, or has other columns than the rest.
    """
    return READERS[files.table.format](spark, files, wanted).columns


def open_delimited(spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """Lines of fields. A line equal to the heading is a heading wherever it stands; an empty line is no record."""
    separator, quote = files.table.separator, files.table.quote
    if isinstance(files.table.header, tuple):
        names = list(files.table.header)
        return Opened(names, partial(_read_fields, spark, files, names, [], separator, quote))
    return _open_headed(spark, files, separator, quote)


def open_atomic(spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """RecBole's atomic files: fields between tabs, under a heading of `name:type`."""
    return _open_headed(spark, files, TAB, None, lambda heading: heading.partition(":")[0])


def open_json(spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """Lines of JSON, an object each, whose values are kept as text; `a.b` is the member `b` of an object `a`."""
    lines = next(filter(None, (first_lines(uri, LOOKED_AT) for uri in files.uris)), [])
    names = list(dict.fromkeys(name for line in lines for name in names_in(line.decode(files.table.encoding, "replace"))))
    read = partial(_read_objects, spark, files)
    rare = [name for name in wanted if name not in names]
    if rare:
        with unreadable_files():
            counted = read(rare).agg(*[F.count(F.col("values").getField(name)) for name in rare]).first()
        assert counted is not None
        names += [name for name, count in zip(rare, counted, strict=True) if count]
    if not names:
        raise SourceError(f"{files.first} does not begin with a JSON object; write one object a line")
    return Opened(names, read)


def open_known(spark: SparkSession, files: Files, wanted: Sequence[str]) -> Opened:
    """A table that Spark knows, or a query, with the types that it has."""
    frame = frame_of(spark, files)

    def read(columns: Sequence[str]) -> DataFrame:
        values = F.struct(*[column(name) for name in columns])
        return frame.select(F.lit(files.names[0]).alias("file"), nothing("record"), nothing("fault"), values.alias("values"))

    return Opened(frame.columns, read)


READERS: dict[str, Callable[[SparkSession, Files, Sequence[str]], Opened]] = {
    "delimited": open_delimited,
    "atomic": open_atomic,
    "json": open_json,
    "parquet": partial(open_columnar, PARQUET),
    "orc": partial(open_columnar, ORC),
    "table": open_known,
    "query": open_known,
    "npz": open_npz,
    "npy": open_npy,
}
"""What opens a table of each format, for reading columns some of which are wanted."""


def pattern_of(separator: str) -> str:
    """The regular expression that stands for a separator by the letter, in the form that Java splits at without one."""
    return "".join(letter if letter.isalnum() else "\\" + letter for letter in separator)


def split_fields(line: str, separator: str, quote: str | None) -> list[str]:
    """The fields of a line.

    Raises:
        ValueError: its quotes do not match.
    """
    if quote is None:
        return line.split(separator)
    # Python before 3.11.5 does not match possessive groups as it should; its own repeats need no deep stack.
    field = re.compile(_field(separator, quote, often="*"))
    fields, rest = [], separator + line
    while rest:
        found = field.match(rest, len(separator)) if rest.startswith(separator) else None
        if found is None:
            raise ValueError(WRONG_QUOTES)
        fields.append(found[0][1:-1].replace(quote * 2, quote) if found[0].startswith(quote) else found[0])
        rest = rest[found.end() :]
    return fields


def _field(separator: str, quote: str, often: str = "*+") -> str:
    """The regular expression of a field, quoted or not. It never goes back, so that Java needs no deep stack for a long one."""
    mark, end = pattern_of(quote), pattern_of(separator)
    plain = f"[^{mark}{end}]{often}" if len(separator) == 1 else f"(?:(?!{end})[^{mark}]){often}"
    return f"(?:{mark}[^{mark}]{often}(?:{mark}{mark}[^{mark}]{often}){often}{mark}|{plain})"


def _open_headed(
    spark: SparkSession, files: Files, separator: str, quote: str | None, name_of: Callable[[str], str] = str
) -> Opened:
    """Lines of fields under a heading, which must name the same columns in every file."""
    headings = each(partial(_heading, encoding=files.table.encoding), files.uris)
    names: list[str] = []
    for uri, heading in zip(files.uris, headings, strict=True):
        try:
            there = [name_of(field) for field in split_fields(heading, separator, quote)]
        except ValueError as error:
            raise SourceError(f"{uri} has a first line whose {error}: {heading!r}") from error
        names = names or there
        if there != names:
            require_columns(uri, there, names)
            raise SourceError(f"{uri} has other columns than {files.first}, or another order: {heading!r}, not {headings[0]!r}")
    return Opened(names, partial(_read_fields, spark, files, names, sorted(set(headings)), separator, quote))


def _heading(uri: str, encoding: str) -> str:
    """The first line of a file."""
    (line, *_) = first_lines(uri, 1) or [b""]
    if not line:
        raise SourceError(f"{uri} has an empty first line, which should name its columns")
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri} is not {encoding} text: {error}. Set encoding to what it is, as latin-1") from error


def _read_fields(
    spark: SparkSession,
    files: Files,
    names: Sequence[str],
    headings: Sequence[str],
    separator: str,
    quote: str | None,
    columns: Sequence[str],
) -> DataFrame:
    lines = read_lines(spark, files)
    if headings:
        lines = lines.where(~F.col("record").isin(*headings))
    text = F.col("text")
    fault = F.when(text.isNull(), UNDECODABLE)
    if quote is None:
        # -1 keeps empty fields at the end.
        fields = F.split(text, pattern_of(separator), -1)
    else:
        # Each match begins where the one before ended, so where a field is none, the matches end.
        pattern = rf"\G{pattern_of(separator)}({_field(separator, quote)})"
        fields = F.regexp_extract_all(F.concat(F.lit(separator), text), F.lit(pattern), F.lit(1))
        fault = fault.when(F.array_join(fields, separator) != text, WRONG_QUOTES)
    fault = fault.when(F.size(fields) != len(names), WRONG_FIELDS)
    values = F.struct(*[_unquoted(F.get(fields, names.index(name)), quote).alias(name) for name in columns])
    return lines.select("file", "record", fault.alias("fault"), values.alias("values"))


def _unquoted(field: Column, quote: str | None) -> Column:
    if quote is None:
        return field
    inner = F.substr(field, F.lit(2), F.length(field) - 2)
    return F.when(field.startswith(quote), F.replace(inner, F.lit(quote * 2), F.lit(quote))).otherwise(field)


def _read_objects(spark: SparkSession, files: Files, columns: Sequence[str]) -> DataFrame:
    lines = read_lines(spark, files).where(F.trim("record") != "")
    names = list(columns)

    def take_apart(texts: pa.Array) -> pa.Array:
        found = [None if text is None else texts_of(text, names) for text in texts.to_pylist()]
        faults = [NOT_AN_OBJECT if members is None else None for members in found]
        arrays = [pa.array([members and members[place] for members in found], pa.string()) for place in range(len(names))]
        return pa.StructArray.from_arrays([pa.array(faults, pa.string()), *arrays], names=places)

    # By their places, since a column may be called as the fault is.
    places = ["fault", *[str(place) for place in range(len(names))]]
    kind = StructType([StructField(place, StringType()) for place in places])
    parsed = lines.withColumn("parsed", arrow_udf(take_apart, kind)("text"))  # type: ignore[call-overload]
    fault = F.when(F.col("text").isNull(), UNDECODABLE).otherwise(F.col("parsed").getField("fault"))
    values = F.struct(*[F.col("parsed").getField(str(place)).alias(name) for place, name in enumerate(names)])
    return parsed.select("file", "record", fault.alias("fault"), values.alias("values"))
