"""What every metric is for each user, as a Parquet table: written by all ranks in parts, put in order by one of them.

Ranks take tiles of users in turn, so tile t is the (t // ranks)-th tile of rank t % ranks. Each rank keeps its tiles, a
record batch each, in parts of bounded size beside the result. One batch of each rank in turn is then the order of the
dataset, and the table is cut anew into row groups of one size: its bytes tell nothing of ranks or tiles. Nothing here
holds all users, but for what tells their groups.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter
from torch import Tensor

from sibra_dist.config import Config
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.manifest import read_shard
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError
from sibra_dist.evaluation.groups import GroupAverages, Grouping

ROWS = 65536
"""In a row group."""
PART_BYTES = 32 * 2**20
PIECE_BYTES = 2**20


class UsersFile(Config):
    """What a result says of the table beside it."""

    file: str
    rows: int
    sha256: str


class UserParts:
    """The tiles of one rank, in files in a folder `parts` in `folder`."""

    def __init__(self, folder: Place, parts: str, rank: int, metrics: Sequence[str]) -> None:
        self.folder = folder
        self.parts = parts
        self.rank = rank
        self.count = 0
        """Of the parts written"""
        self.error: OSError | None = None
        """Why a part could not be written; nothing more is written then."""
        self._schema = pa.schema([("user", pa.int64()), *((metric, pa.float64()) for metric in metrics)])
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0

    def add(self, users: Tensor, num_relevant: Tensor, values: Tensor) -> None:
        """Keep a tile, as `sibra_dist.evaluation.findings.EachTile` says; users with nothing relevant are left out."""
        users, values, averaged = users.cpu(), values.cpu(), num_relevant.cpu() > 0
        columns = [users[averaged], *values[averaged].unbind(1)]
        # Also a tile of nobody, so that the others' tiles keep their places.
        batch = pa.RecordBatch.from_arrays([pa.array(column.numpy()) for column in columns], schema=self._schema)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._batches and self.error is None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, self._schema) as writer:
                for batch in self._batches:
                    writer.write_batch(batch)
            try:
                self.folder.write(_part(self.parts, self.rank, self.count), sink.getvalue())
                self.count += 1
            except OSError as error:
                # An exception here would leave the other ranks waiting for this one.
                self.error = error
        self._batches, self._bytes = [], 0

    def delete(self) -> None:
        """Delete the parts of this rank; `OSError` if that is not possible."""
        self.folder.delete(_part(self.parts, self.rank, number) for number in range(self.count))


def publish_users(
    folder: Place,
    name: str,
    parts: str,
    counts: Sequence[int],
    dataset: Dataset,
    groupings: Sequence[Grouping],
    averages: GroupAverages,
) -> UsersFile:
    """Write file `name`: a row for each user in the parts, with id, groups and metrics, and add all of them to `averages`.

    It is made in a temporary file of this machine, so that it appears whole or not at all in an object store too.

    Args:
        folder: where the file goes.
        name: its name.
        parts: the folder in it with all ranks' `UserParts`.
        counts: how many parts each rank wrote.
        dataset: what was evaluated.
        groupings: a column each, of the group's label, null for a user that belongs to none.
        averages: told every user; its metrics are the columns of the parts.

    Raises:
        OSError: a part cannot be read, or the file not be written.
        DatasetError: the ids of the users cannot be read.
    """
    with TemporaryFile() as file:
        rows = _write(file, _in_order(folder, parts, counts), dataset, groupings, averages)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        folder.write(name, iter(lambda: memoryview(file.read(PIECE_BYTES)), b""))
    return UsersFile(file=name, rows=rows, sha256=sha256)


def read_users(folder: Place, told: object, columns: Sequence[str], remedy: str) -> pa.Table:
    """Some columns of the table that a result tells of (its field `users`, read from JSON).

    Raises:
        CheckpointError: the result tells of none, or the file is not the one it tells of, or lacks a column; `remedy` says
            what to do then.
    """
    if told is None:
        raise CheckpointError(f"{folder} holds no values of single users, as an earlier version wrote it: {remedy}")
    users = TypeAdapter(UsersFile).validate_python(told)
    path = folder / users.file
    try:
        content = hashlib.sha256()
        with folder.stream(users.file) as stream:
            while piece := stream.read(PIECE_BYTES):
                content.update(piece)
        if content.hexdigest() != users.sha256:
            raise CheckpointError(f"{path} is not the file that the result beside it tells of: {remedy}")
        with folder.open(users.file) as file:
            found = pq.ParquetFile(file)
            if absent := [column for column in columns if column not in found.schema_arrow.names]:
                raise CheckpointError(f"{path} has no column {', '.join(absent)}: {remedy}")
            return found.read(list(columns))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}: {remedy}") from error


def _part(parts: str, rank: int, number: int) -> str:
    return f"{parts}/{rank:05}-{number:05}.arrow"


def _in_order(folder: Place, parts: str, counts: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """All tiles, in the order of the dataset."""
    for turn in zip_longest(*(_tiles(folder, parts, rank, count) for rank, count in enumerate(counts))):
        yield from (tile for tile in turn if tile is not None)


def _tiles(folder: Place, parts: str, rank: int, count: int) -> Iterator[pa.RecordBatch]:
    for number in range(count):
        with folder.open(_part(parts, rank, number)) as file, pa.ipc.open_file(file) as reader:
            for tile in range(reader.num_record_batches):
                yield reader.get_batch(tile)


def _cut(tiles: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows, `rows` at a time; the last may be fewer."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for tile in tiles:
        waiting.append(tile)
        count += tile.num_rows
        while count >= rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, rows).combine_chunks()
            waiting, count = table.slice(rows).to_batches(), count - rows
    if count:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _write(
    file: IO[bytes],
    tiles: Iterator[pa.RecordBatch],
    dataset: Dataset,
    groupings: Sequence[Grouping],
    averages: GroupAverages,
) -> int:
    labels = {grouping.name: pa.array(grouping.labels, pa.string()) for grouping in groupings}
    texts, numbers = ["user_id", *labels], averages.metrics
    schema = pa.schema([*((name, pa.string()) for name in texts), *((name, pa.float64()) for name in numbers)])
    rows = 0
    with pq.ParquetWriter(file, schema) as writer:
        for ids, table in _with_ids(dataset, _cut(tiles, ROWS)):
            users = torch.from_numpy(table["user"].to_numpy().copy())
            values = [table[metric].to_numpy() for metric in numbers]
            groups = [grouping.groups(users).numpy() for grouping in groupings]
            columns = [
                labels[grouping.name].take(pa.array(found, mask=found < 0))
                for grouping, found in zip(groupings, groups, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays([ids, *columns, *values], schema=schema), row_group_size=ROWS)
            averages.update(users, torch.from_numpy(np.stack(values, axis=1) if values else np.empty((len(users), 0))))
            rows += len(users)
    return rows


def _with_ids(dataset: Dataset, tables: Iterator[pa.Table]) -> Iterator[tuple[pa.ChunkedArray, pa.Table]]:
    """The external ids of the users of each table; users ascend, so the ids of one shard are held at a time."""
    shards = iter(dataset.manifest.shards["users"])
    start, stop, ids = 0, 0, None
    for table in tables:
        users, found = table["user"].to_numpy(), []
        while len(users):
            while users[0] >= stop:
                shard = next(shards)
                start, stop, ids = stop, stop + shard.rows, None
            if ids is None:
                ids = read_shard(dataset.place, shard, ["id"])["id"].combine_chunks()
            here = int(np.searchsorted(users, stop))
            found.append(ids.take(pa.array(users[:here] - start)))
            users = users[here:]
        yield pa.chunked_array(found, pa.string()), table
