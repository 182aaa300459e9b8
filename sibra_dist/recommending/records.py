"""Reads the recommendations of any system, batch by batch: a table, or a folder of them."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError, SourceError
from sibra_dist.recommending.listings import ITEM, PARQUET, SEPARATORS, USER, require_columns, suffix_of
from sibra_dist.recommending.manifest import MANIFEST, Recommended

RANK, SCORE = "rank", "score"
BATCH_ROWS = 2**20
BLOCK_BYTES = 2**25
"""Of a text, read at once."""
HEADER_BYTES = 2**16


class Batch(NamedTuple):
    """Some records as they were read."""

    users: pa.Array
    """string [n]"""
    items: pa.Array
    """string [n]"""
    values: pa.Array
    """float64 [n]: ranks or scores"""

    def some(self, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> "Batch":
        """Those that are chosen, bool [n]."""
        return Batch(*(column.filter(pa.array(chosen)) for column in self))


class Source(NamedTuple):
    """Where recommendations are read from."""

    name: str
    """As it was given."""
    place: Place
    files: tuple[str, ...]
    ranked: bool
    """Whether ranks tell the order of a user's items, rather than scores."""

    @classmethod
    def of(cls, name: str) -> Self:
        """A table (`.csv`, `.tsv`, `.parquet`), or all in a folder, which may be one that `sibra-dist recommend` wrote.

        Raises:
            SourceError: there is none, it cannot be read, is not complete, or has no column that tells the order.
        """
        with _readable(name):
            place, files = _files(name)
            there = _header(place, files[0])
        if RANK not in there and SCORE not in there:
            raise SourceError(f"{name} has no column {RANK} or {SCORE}: add the one that tells the order of a user's items")
        return cls(name, place, files, RANK in there)

    def batches(self) -> Iterator[Batch]:
        """All records, in the order of the files.

        Raises:
            SourceError: a file cannot be read, lacks a column, or a rank or score is not a number.
        """
        columns = (USER, ITEM, RANK if self.ranked else SCORE)
        for name in self.files:
            file = str(self.place / name)
            with _readable(file):
                require_columns(file, columns, _header(self.place, name))
                for table in _tables(self.place, name, columns):
                    yield _checked(file, columns[2], _batch(table, columns))


def _files(name: str) -> tuple[Place, tuple[str, ...]]:
    """The folder, and the tables in it that are meant."""
    place = Place.at(name)
    folder, _, file = place.uri.rpartition("/")
    if Place(folder or "/").status(file) is not None:
        if _suffix(file) is None:
            raise SourceError(f"{name} is no table: give a .csv, .tsv or .parquet with a header, or a folder of them")
        return Place(folder or "/"), (file,)
    there = place.files()
    if MANIFEST in there:
        found = Recommended.of(place)
        if not found.complete:
            raise SourceError(f"{name} is not complete yet: give the command that makes these recommendations again")
        files = [shard.path for shard in found.shards]
    else:
        files = [file for file in there if _suffix(file) is not None and not _is_hidden(file)]
    if not files:
        raise SourceError(f"{name} cannot be read: there is no such table, nor a folder that holds any. Check its name")
    return place, tuple(files)


def _is_hidden(file: str) -> bool:
    """Whether the file, or a folder that it is in, has a name by which Spark and others mark what is no data."""
    return any(part.startswith((".", "_")) for part in file.split("/"))


def _suffix(file: str) -> str | None:
    return suffix_of(file, (*SEPARATORS, PARQUET))


def _header(place: Place, file: str) -> list[str]:
    """Names of the columns."""
    suffix = _suffix(file)
    if suffix is None or suffix == PARQUET:
        with place.open(file) as opened:
            names: list[str] = pq.ParquetFile(opened).schema_arrow.names
            return names
    with place.stream(file) as stream:
        line = stream.read(HEADER_BYTES).partition(b"\n")[0].decode("utf-8-sig").removesuffix("\r")
    return next(csv.reader([line], delimiter=SEPARATORS[suffix]), [])


def _tables(place: Place, file: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    suffix = _suffix(file)
    if suffix is None or suffix == PARQUET:
        with place.open(file) as opened:
            yield from pq.ParquetFile(opened).iter_batches(BATCH_ROWS, columns=list(columns))
        return
    types = dict(zip(columns, (pa.string(), pa.string(), pa.float64()), strict=True))
    with place.stream(file) as stream:
        yield from pa_csv.open_csv(
            stream,
            pa_csv.ReadOptions(block_size=BLOCK_BYTES),
            pa_csv.ParseOptions(delimiter=SEPARATORS[suffix]),
            pa_csv.ConvertOptions(column_types=types, include_columns=list(columns)),
        )


def _batch(table: pa.RecordBatch, columns: Sequence[str]) -> Batch:
    users, items = (table[column].cast(pa.string()).fill_null("") for column in columns[:2])
    return Batch(users, items, table[columns[2]].cast(pa.float64()).fill_null(np.nan))


def _checked(file: str, column: str, batch: Batch) -> Batch:
    wrong = pc.index(pc.is_nan(batch.values), True).as_py()
    if wrong >= 0:
        raise SourceError(
            f"{file} has no number as {column} of item {batch.items[wrong].as_py()!r} for user {batch.users[wrong].as_py()!r}; "
            "give it one, or leave the record out"
        )
    return batch


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading into one error."""
    try:
        yield
    except (OSError, pa.ArrowException, ValueError, DatasetError) as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200].rstrip(".")
        raise SourceError(
            f"{file} cannot be read: {said}. Check its name, and that it is of the kind that this says"
        ) from error
