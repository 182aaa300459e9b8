"""Reads the files of a request: users, one a line or a column of a table; pairs of users and items.

A file may lie wherever a `Place` may. Ids are compared by the letter, as text. What cannot be used is kept with its reason.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.data.results import ID_COLUMNS
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError, SourceError, nearest

USER, ITEM = ID_COLUMNS["users"], ID_COLUMNS["items"]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
UNKNOWN_ID, DUPLICATE_ID = "unknown id", "duplicate id"
UNKNOWN_USER, UNKNOWN_ITEM = "unknown user id", "unknown item id"

Numbers = npt.NDArray[np.int64]


class Rejected(NamedTuple):
    """A record that was not used."""

    file: str
    reason: str
    record: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """A file of ids as read."""

    name: str
    """As it was given."""
    sha256: str
    columns: tuple[pa.Array, ...]
    """strings, as long as each other"""


class Entities(NamedTuple):
    """Users or items to embed, each with the id by which others know it."""

    ids: pa.ChunkedArray
    """string [n]"""
    indices: Tensor
    """int64 [n]: in the dataset"""


def read_listing(file: str, columns: Sequence[str]) -> Listing:
    """Read columns of a table (`.csv`, `.tsv` with a header, `.parquet`), or of any other file a single one, a line each.

    Raises:
        SourceError: it cannot be read, or lacks a column.
    """
    content = content_of(file)
    suffix = suffix_of(file, (*SEPARATORS, PARQUET))
    with readable(file):
        if suffix is not None:
            read = _read_table(file, content, suffix, columns)
        elif len(columns) == 1:
            lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
            read = (pa.array([line for line in lines if line], pa.string()),)
        else:
            raise SourceError(f"{file} is no table with the columns {' and '.join(columns)}: give a .csv, .tsv or .parquet")
    return Listing(file, hashlib.sha256(content).hexdigest(), read)


def content_of(file: str) -> bytes:
    """The content of a file, wherever it lies.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        folder, _, name = Place.at(file).uri.rpartition("/")
        return Place(folder or "/").read(name)
    except (OSError, DatasetError) as error:
        raise SourceError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}. Check its name") from error


def suffix_of(file: str, known: Sequence[str]) -> str | None:
    """Which of the known endings a file's name has; None: another."""
    return next((suffix for suffix in known if file.lower().endswith(suffix)), None)


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Turn whatever is wrong with the content of a file into one error."""
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, RecursionError, OSError) as error:
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise SourceError(f"{file} cannot be read: {said}. Check that it is of the kind that its name says") from error


def find_users(listing: Listing, known: pa.ChunkedArray) -> tuple[Entities, list[Rejected]]:
    """The users that a listing names, in its order, each once.

    Args:
        listing: of one column.
        known: the ids of the dataset's users, in index order.

    Raises:
        SourceError: none of them is known.
    """
    (ids,) = listing.columns
    found = positions(ids, known)
    first = np.zeros(len(found), bool)
    first[np.unique(found, return_index=True)[1]] = True
    used = (found >= 0) & first
    if not used.any():
        example = f", for example {ids[0].as_py()!r}" if len(ids) else ""
        raise SourceError(f"none of the {len(ids)} ids of {listing.name} is a user of the dataset{example}; check that file")
    refused = [
        Rejected(listing.name, UNKNOWN_ID if found[row] < 0 else DUPLICATE_ID, (ids[row].as_py(),))
        for row in np.flatnonzero(~used).tolist()
    ]
    return Entities(pa.chunked_array([ids.filter(pa.array(used))]), torch.from_numpy(found[used])), refused


def find_pairs(listing: Listing, users: pa.ChunkedArray, items: pa.ChunkedArray) -> tuple[tuple[Tensor, Csr], list[Rejected]]:
    """The users that a listing of pairs names, int64 ascending, and their items, a row each of those users.

    Args:
        listing: of users and of items.
        users: the ids of the dataset's users, in index order.
        items: likewise.
    """
    user_ids, item_ids = listing.columns
    user, item = positions(user_ids, users), positions(item_ids, items)
    used = (user >= 0) & (item >= 0)
    refused = [
        Rejected(
            listing.name,
            UNKNOWN_USER if user[row] < 0 else UNKNOWN_ITEM,
            (user_ids[row].as_py(), item_ids[row].as_py()),
        )
        for row in np.flatnonzero(~used).tolist()
    ]
    return by_user(user[used], item[used], len(items)), refused


def by_user(users: Numbers, items: Numbers, num_items: int) -> tuple[Tensor, Csr]:
    """Pairs of users and items, each once: the users, int64 ascending, and their items, a row each of those users."""
    pairs = np.unique(users * num_items + items)
    holders, lengths = np.unique(pairs // num_items, return_counts=True)
    indptr = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int64))
    return torch.from_numpy(holders), Csr(indptr, torch.from_numpy((pairs % num_items).astype(np.int32)))


def count_rejected(refused: Sequence[Rejected]) -> dict[str, int]:
    """How many records, by reason, in the order of the reasons."""
    return dict(sorted(Counter(record.reason for record in refused).items()))


def rejected_csv(refused: Sequence[Rejected]) -> bytes:
    """The records as the content of a file: file, reason, record."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Rejected._fields)
    writer.writerows((record.file, record.reason, ",".join(record.record)) for record in refused)
    return text.getvalue().encode()


def _read_table(file: str, content: bytes, suffix: str, columns: Sequence[str]) -> tuple[pa.Array, ...]:
    if suffix == PARQUET:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        require_columns(file, columns, parquet.schema_arrow.names)
        table = parquet.read(list(columns))
    else:
        header = content.partition(b"\n")[0].decode("utf-8-sig").removesuffix("\r")
        require_columns(file, columns, next(csv.reader([header], delimiter=SEPARATORS[suffix]), []))
        table = pa_csv.read_csv(
            pa.BufferReader(content),
            parse_options=pa_csv.ParseOptions(delimiter=SEPARATORS[suffix]),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns),
        )
    return tuple(table[column].combine_chunks().cast(pa.string()).fill_null("") for column in columns)


def require_columns(file: str, columns: Sequence[str], there: Sequence[str]) -> None:
    """Check that a table has some columns.

    Raises:
        SourceError: it lacks one, or has it more than once.
    """
    for column in columns:
        if column not in there:
            raise SourceError(f"{file} has no column {column}; {nearest(column, there)}")
        if there.count(column) > 1:
            raise SourceError(f"{file} has {there.count(column)} columns {column}; leave one of them")


def positions(ids: pa.Array, known: pa.ChunkedArray) -> Numbers:
    """Where each id is in `known`, int64 [n]; -1 if it is not."""
    found: Numbers = pc.index_in(ids, value_set=known).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found
