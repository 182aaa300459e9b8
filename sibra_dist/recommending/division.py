"""Divides recommendations by user among temporary files: neither their number nor their order matters to memory.

What is held is a batch of records and the ids of the dataset; later, the records of some thousands of users.
"""

from collections import Counter
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from torch import Tensor

from sibra_dist.errors import SourceError
from sibra_dist.evaluation.truth import Truth
from sibra_dist.recommending.listings import UNKNOWN_ITEM, UNKNOWN_USER, Rejected, positions
from sibra_dist.recommending.records import Batch, Source

USERS_PER_PART = 8192
RECORD = np.dtype([("row", np.int32), ("item", np.int32), ("order", np.float64)])
"""A row of `Truth.users`, a candidate, and what ascends from the best to the worst: the rank, or the score times -1."""
NOT_RANKED = "no candidate of the split"

Records = npt.NDArray[np.void]


class Ids(NamedTuple):
    """External ids of a dataset, in index order."""

    users: pa.ChunkedArray
    items: pa.ChunkedArray


class Rejections:
    """Records that do not count: told in a file, in the form of `rejected.csv`, and counted by reason."""

    def __init__(self, source: str, file: IO[bytes]) -> None:
        self.counts: Counter[str] = Counter()
        self._source, self._file = source, file
        file.write((",".join(Rejected._fields) + "\n").encode())

    def add(self, reason: str, batch: Batch) -> None:
        """Add records, all for one reason."""
        if not len(batch.users):
            return
        self.counts[reason] += len(batch.users)
        records = pc.binary_join_element_wise(batch.users, batch.items, batch.values.cast(pa.string()), ",")
        same = [pa.repeat(text, len(records)) for text in (self._source, reason)]
        pa_csv.write_csv(
            pa.table([*same, records], names=Rejected._fields), self._file, pa_csv.WriteOptions(include_header=False)
        )


class Part(NamedTuple):
    """Consecutive rows of `Truth.users`, and the file of their records."""

    start: int
    stop: int
    path: Path

    def append(self, records: Records) -> None:
        """Add records to the file."""
        if len(records):
            with self.path.open("ab") as file:
                records.tofile(file)

    def read(self) -> Records:
        """All records."""
        return np.fromfile(self.path, RECORD) if self.path.exists() else np.empty(0, RECORD)


def divide(source: Source, truth: Truth, ids: Ids, folder: Path, rejections: Rejections) -> tuple[list[Part], int]:
    """Divide the records of a source by user among files in a folder, and count all of them.

    Records of users who hold nothing out in the split are passed over. It takes 16 bytes of disk a record.

    Raises:
        SourceError: the source cannot be read, or none of its records is of a user and an item of the dataset.
    """
    starts = range(0, len(truth.users), USERS_PER_PART)
    parts = [Part(start, min(start + USERS_PER_PART, len(truth.users)), folder / f"{start}.records") for start in starts]
    row_of = np.full(len(ids.users), -1, np.int32)
    row_of[truth.users.numpy()] = np.arange(len(truth.users), dtype=np.int32)
    candidate_of = truth.position.numpy().astype(np.int32)
    count, known = 0, 0
    for batch in source.batches():
        user, item = positions(batch.users, ids.users), positions(batch.items, ids.items)
        found = (user >= 0) & (item >= 0)
        row, candidate = row_of[user], candidate_of[item]
        judged = found & (row >= 0)
        used = judged & (candidate >= 0)
        rejections.add(UNKNOWN_USER, batch.some(user < 0))
        rejections.add(UNKNOWN_ITEM, batch.some((user >= 0) & (item < 0)))
        rejections.add(NOT_RANKED, batch.some(judged & (candidate < 0)))
        records = np.empty(int(used.sum()), RECORD)
        values = batch.values.to_numpy()[used]
        records["row"], records["item"], records["order"] = row[used], candidate[used], values if source.ranked else -values
        _append(records, parts)
        count, known = count + len(user), known + int(found.sum())
    if not known:
        raise SourceError(
            f"none of the {count:,} records of {source.name} is of a user and an item of {truth.dataset.place}; "
            "check the file and the dataset"
        )
    return parts, count


def as_read(records: Records, source: Source, users: Tensor, candidates: Tensor, ids: Ids) -> Batch:
    """The records as they were read, given which users, int64 [U], the rows are and which items, int64 [C], the candidates."""
    ordered = records["order"] if source.ranked else -records["order"]
    user_ids, item_ids = (
        known.take(pa.array(entities.numpy()[places])).combine_chunks()
        for known, entities, places in ((ids.users, users, records["row"]), (ids.items, candidates, records["item"]))
    )
    return Batch(user_ids, item_ids, pa.array(ordered))


def _append(records: Records, parts: list[Part]) -> None:
    """Add records, each to the part of its user."""
    number = records["row"] // USERS_PER_PART
    records = records[np.argsort(number, kind="stable")]
    counts = np.bincount(number, minlength=len(parts))
    stops = counts.cumsum()
    for place in np.flatnonzero(counts).tolist():
        parts[place].append(records[stops[place] - counts[place] : stops[place]])
