"""Opens a prepared dataset as tensors that are memory-mapped from a cache on this node.

The first process of a node that opens a dataset verifies its shards and decodes them, once, into flat arrays; every
other process, and every later run, maps those arrays. So ranks of one node share one copy in the page cache, a dataset
larger than a rank's memory can be opened, and one in an object store is downloaded once a node.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from sibra_dist.data.cache import Arrays, ArrayWriter, ReadColumns, cached_arrays
from sibra_dist.data.manifest import SIDES, FeatureSpec, Manifest, Side, read_shard
from sibra_dist.data.storage import Place
from sibra_dist.data.transfer import to_device
from sibra_dist.errors import DatasetError

SPLITS = ("train", "validation", "test")
DTYPES = {"weights": np.float32, "times": np.int64}
HeldOut = Literal["validation", "test"]
Candidates = Literal["split", "all"]
"""What is ranked: the items that the protocol says, or all."""


@dataclass(frozen=True)
class Csr:
    """A sparse 0/1 matrix by row: the columns of row r are `indices[indptr[r]:indptr[r + 1]]`, in ascending order."""

    indptr: Tensor
    """int64 [rows + 1]"""
    indices: Tensor
    """int32 [nnz]"""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.indptr.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.indices.numel()

    def lengths(self, rows: Tensor | None = None) -> Tensor:
        """Entries of each row, or of each of `rows`: int64."""
        if rows is None:
            return self.indptr.diff()
        return self.indptr[rows + 1] - self.indptr[rows]

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of some rows, end to end: columns int32 [total], and where each row starts int64 [len(rows)]."""
        lengths = self.lengths(rows)
        starts = lengths.cumsum(0) - lengths
        shift = torch.repeat_interleave(self.indptr[rows] - starts, lengths)
        positions = torch.arange(shift.numel(), device=shift.device) + shift
        return self.indices.index_select(0, positions), starts


@dataclass(frozen=True)
class Feature:
    """One feature of every user or every item, with who has it."""

    spec: FeatureSpec
    present: Tensor
    """bool [entities]"""
    values: Tensor | Csr
    """category: int32 [entities] codes; tags: `Csr` of codes; numeric, vector: float32 [entities, size]. Zero where absent."""


@dataclass(frozen=True)
class Entities:
    """The users, or the items, of a dataset."""

    count: int
    split: Tensor
    """int8 [count]: in which of `SPLITS` each first appears"""
    histories: Csr
    """training interactions: columns are entities of the other side"""
    features: dict[str, Feature]
    weights: Tensor | None = None
    """float32 [nnz]: of each entry of `histories`, if the dataset has weights"""
    times: Tensor | None = None
    """int64 [nnz]: when, in milliseconds since 1970, for each entry of the users' `histories`, if the dataset has times"""
    newcomers: int = 0
    """How many of them, the last, came after the dataset was made: see `sibra_dist.data.newcomers`"""

    @property
    def known(self) -> int:
        """How many of them, the first, the dataset has: those that a model's parameters know of."""
        return self.count - self.newcomers

    @property
    def known_histories(self) -> Csr:
        """The histories of those alone."""
        indptr = self.histories.indptr[: self.known + 1]
        return Csr(indptr, self.histories.indices[: int(indptr[-1])]) if self.newcomers else self.histories

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.split.device


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset; see `sibra_dist.data.manifest` for what is on disk."""

    place: Place
    manifest: Manifest
    users: Entities
    items: Entities
    held_out: dict[HeldOut, tuple[Tensor, Csr]]
    """Users that hold something out, int32 [n] ascending, and their items, a row each of those users."""
    newcomers: Mapping[Side, pa.Array] = field(default_factory=dict)
    """The ids of newcomers, in index order."""

    def to(self, device: torch.device) -> "Dataset":
        """The dataset with its tensors on a device, where models, batches and evaluation share them.

        Times stay behind: nothing reads them once the dataset is split.
        """
        if device == self.users.device:
            return self
        users, items = replace(self.users, times=None), replace(self.items, times=None)
        users, items, held_out = to_device((users, items, self.held_out), device)
        return replace(self, users=users, items=items, held_out=held_out)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.users.device

    @cached_property
    def training_items(self) -> Tensor:
        """Items that training may show, int64 ascending: all but the cold ones."""
        return torch.nonzero(self.items.split == 0).flatten()

    def candidates(self, split: HeldOut, which: Candidates = "split") -> Tensor:
        """Items that are ranked in a split, int64 ascending: all, or where items are split the split's own by default."""
        if self.manifest.protocol.cold_items and which == "split":
            return torch.nonzero(self.items.split == SPLITS.index(split)).flatten()
        return torch.arange(self.items.count, device=self.device)

    def masked(self, split: HeldOut, users: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is not recommended again: training items, and when testing validation items too.

        Args:
            split: the split that is ranked.
            users: int64 [n] users.

        Returns:
            Pairs (row int64 [m], item int64 [m]) where row is a position in `users`.
        """
        pairs = [_pairs(self.users.histories, users)]
        if split == "test":
            pairs.append(pairs_of(*self.held_out["validation"], users))
        return pairs

    def ids(self, side: Side) -> pa.ChunkedArray:
        """The external ids, in index order; read from the shards, so not for inner loops."""
        shards = self.manifest.shards[side]
        known = [read_shard(self.place, shard, ["id"])["id"].combine_chunks() for shard in shards]
        return pa.chunked_array([*known, *([self.newcomers[side]] if side in self.newcomers else [])], pa.string())


def open_dataset(place: str | Path | Place, cache: Path | None = None) -> Dataset:
    """Open the dataset in folder `place`.

    Args:
        place: the dataset folder: a path, or a URI such as `s3://bucket/folder`.
        cache: where decoded arrays are kept; by default `sibra_dist.data.cache.default_cache()`.

    Raises:
        DatasetError: no dataset is there, it is damaged, or a newer version wrote it.
    """
    place = Place.at(place)
    manifest = Manifest.read(place)
    arrays = cached_arrays(place, manifest, cache, _decode)
    return Dataset(
        place=place,
        manifest=manifest,
        users=_entities(manifest, arrays, "users", manifest.counts.users),
        items=_entities(manifest, arrays, "items", manifest.counts.items),
        held_out={
            "validation": (arrays["held_out/validation/index"], _csr(arrays, "held_out/validation")),
            "test": (arrays["held_out/test/index"], _csr(arrays, "held_out/test")),
        },
    )


def pairs_of(holders: Tensor, matrix: Csr, users: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of some users in a matrix that has rows for a few of all users only.

    Args:
        holders: whose the rows of the matrix are, ascending.
        matrix: a row each of the holders.
        users: int64 [n] users.

    Returns:
        Pairs (row int64 [m], column int64 [m]) where row is a position in `users`.
    """
    if not len(holders):
        return _pairs(matrix, users[:0])
    position = torch.searchsorted(holders, users.to(holders.dtype)).clamp(max=len(holders) - 1)
    known = torch.nonzero(holders[position] == users).flatten()
    rows, columns = _pairs(matrix, position[known])
    return known[rows], columns


def _pairs(matrix: Csr, rows: Tensor) -> tuple[Tensor, Tensor]:
    columns, _ = matrix.gather(rows)
    return torch.repeat_interleave(matrix.lengths(rows)), columns.long()


def _csr(arrays: Arrays, name: str) -> Csr:
    return Csr(arrays[f"{name}/indptr"], arrays[f"{name}/indices"])


def _entities(manifest: Manifest, arrays: Arrays, side: Side, count: int) -> Entities:
    features = {}
    for spec in manifest.features(side):
        name = f"{side}/{spec.name}"
        values = _csr(arrays, name) if spec.kind == "tags" else arrays[f"{name}/values"]
        features[spec.name] = Feature(spec, arrays[f"{name}/present"], values)
    return Entities(
        count=count,
        split=arrays[f"{side}/split"],
        histories=_csr(arrays, f"histories/{side}"),
        features=features,
        weights=arrays.get(f"histories/{side}/weights"),
        times=arrays.get(f"histories/{side}/times"),
    )


def _decode(manifest: Manifest, read: ReadColumns, arrays: ArrayWriter) -> None:
    for side in SIDES:
        specs = manifest.features(side)
        for shard in manifest.shards[side]:
            table = read(shard, ["split", *(spec.name for spec in specs)])
            codes = pa.compute.index_in(table["split"], pa.array(SPLITS)).to_numpy()
            arrays.append(f"{side}/split", codes.astype(np.int8))
            for spec in specs:
                _append_feature(arrays, f"{side}/{spec.name}", spec, table[spec.name].combine_chunks())
        _decode_histories(manifest, read, arrays, side)
    for split in ("validation", "test"):
        for shard in manifest.shards[f"held_out/{split}"]:
            table = read(shard, ["index", "items"])
            arrays.append(f"held_out/{split}/index", table["index"].to_numpy().astype(np.int32))
            _append_lists(arrays, f"held_out/{split}", table["items"].combine_chunks())


def _decode_histories(manifest: Manifest, read: ReadColumns, arrays: ArrayWriter, side: Side) -> None:
    name, other = f"histories/{side}", "items" if side == "users" else "users"
    beside = [column for column in manifest.interaction_columns if side == "users" or column == "weights"]
    for shard in manifest.shards[name]:
        table = read(shard, [other, *beside])
        lists = table[other].combine_chunks()
        _append_lists(arrays, name, lists)
        for column in beside:
            values = table[column].combine_chunks()
            if values.value_lengths().fill_null(0) != lists.value_lengths().fill_null(0) or values.flatten().null_count:
                raise DatasetError(
                    f"{shard.path} is damaged: {column} are not one for each of {other}. Prepare the dataset again"
                )
            arrays.append(f"{name}/{column}", values.flatten().to_numpy().astype(DTYPES[column]))


def _append_feature(arrays: ArrayWriter, name: str, spec: FeatureSpec, column: pa.Array) -> None:
    arrays.append(f"{name}/present", column.is_valid().to_numpy(zero_copy_only=False))
    if spec.kind == "tags":
        _append_lists(arrays, name, column)
    else:
        arrays.append(f"{name}/values", plain_values(spec, column))


def plain_values(spec: FeatureSpec, column: pa.Array) -> np.ndarray[Any, Any]:
    """The values of a feature of any kind but tags, as `Feature` holds them, from the column of a table."""
    if spec.kind == "category":
        return np.asarray(column.fill_null(0).to_numpy().astype(np.int32))
    dense = np.zeros((len(column), spec.size), np.float32)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    dense[present] = column.drop_null().flatten().to_numpy().reshape(present.sum(), spec.size)
    return dense


def _append_lists(arrays: ArrayWriter, name: str, column: pa.Array) -> None:
    lengths = pa.compute.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    arrays.append_lengths(f"{name}/indptr", lengths)
    arrays.append(f"{name}/indices", column.flatten().to_numpy().astype(np.int32))
