"""Checks of a dataset as it was written, before it is published: every shard is whole, and nothing held out shows in training.

The shards are read back from where everyone will read them, each by a Spark task of its own, with nothing of Spark's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import SparkSession

from sibra_dist.data.manifest import FeatureSpec, Manifest, Shard, read_shard, read_verified_shard
from sibra_dist.data.storage import Place

COMPARED = {
    "histories/users": ("users",),
    "histories/items": ("items",),
    "held_out/validation": ("histories/users",),
    "held_out/test": ("histories/users", "held_out/validation"),
}
"""With which tables the rows of a table are compared."""
TOLERANCE = 1e-3
"""How far mean and deviation of scaled numbers, as stored, may be from 0 and 1."""
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Files:
    """What every check may have to know; sent to each executor once."""

    place: Place
    shards: Mapping[str, tuple[Shard, ...]]
    starts: Mapping[str, tuple[int, ...]]
    """Of tables with an index, the first index that each shard is for, and after the last shard how many there are."""
    specs: Mapping[str, tuple[FeatureSpec, ...]]
    """The features of `users` and `items`, without their vocabularies."""


def check_written(
    spark: SparkSession, place: Place, manifest: Manifest, starts: Mapping[str, tuple[int, ...]], fitted_here: bool
) -> None:
    """Check that every shard is whole, and that nothing of what is held out shows in training.

    No held-out pair is in a training history or in the other held-out split, entities that are new in a later split have no
    history, and codes and scales come from training entities.

    Args:
        spark: the session.
        place: where the shards are.
        manifest: what was written, and not published yet.
        starts: by table what `Written.starts` says.
        fitted_here: whether codes and scales were fitted here and not for a dataset that this one extends.

    Raises:
        DatasetError: a shard is not what was written.
        AssertionError: a defect of this package; the dataset must not be published.
    """
    specs = {"users": manifest.user_features, "items": manifest.item_features}
    light = {
        side: tuple(spec.model_copy(update={"vocabulary": spec.vocabulary and ()}) for spec in there)
        for side, there in specs.items()
    }
    files = spark.sparkContext.broadcast(Files(place, manifest.shards, dict(starts), light))
    tasks = [(table, number) for table, shards in manifest.shards.items() for number in range(len(shards))]

    def check(task: tuple[str, int]) -> tuple[list[str], dict[str, Any]]:
        return check_shard(files.value, *task)

    try:
        checked = spark.sparkContext.parallelize(tasks, len(tasks)).map(check).collect()
    finally:
        files.destroy()
    faults = [fault for found, _ in checked for fault in found]
    if fitted_here:
        for side, there in specs.items():
            shown = [summary for (table, _), (_, summary) in zip(tasks, checked, strict=True) if table == side]
            faults += [fault for spec in there for fault in _unlearned(spec, shown)]
    assert not faults, f"{len(faults)} defects in what was written: {'; '.join(faults[:3])}"


def check_shard(files: Files, table: str, number: int) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a shard, and what the training entities in it show of each feature; runs in a Spark worker."""
    shard = files.shards[table][number]
    rows = read_verified_shard(files.place, shard)
    if table in files.specs:
        training = rows.filter(pc.equal(rows["split"], "train"))
        shown = {spec.name: _shown(training[spec.name].combine_chunks(), spec) for spec in files.specs[table]}
        return _misnumbered(rows, files, table, number), shown
    faults: list[str] = []
    if table.startswith("histories/"):
        faults += _misnumbered(rows, files, table, number)
        first = files.starts[table][number]
        listed = rows.column(1).is_valid().to_numpy()
        for start, other in _overlapping(files, table, number):
            later = pc.not_equal(read_shard(files.place, other, ["split"])["split"], "train").to_numpy()
            low, high = max(start, first), min(start + len(later), first + len(listed))
            known = int((later[low - start : high - start] & listed[low - first : high - first]).sum())
            if known:
                faults.append(f"{known} entities that are new in a later split have training histories in {shard.path}")
    if table.startswith("held_out/"):
        mine = _pairs(rows)
        for _, other in _overlapping(files, table, number):
            shared = np.intersect1d(mine, _pairs(read_shard(files.place, other, ["index", "items"])), assume_unique=True).size
            if shared:
                faults.append(f"{shared} pairs of {shard.path} are in {other.path}")
    return faults, {}


def _overlapping(files: Files, table: str, number: int) -> Iterator[tuple[int, Shard]]:
    """The shards to compare with that are for some of the same indices, and the first index that each is for."""
    low, high = files.starts[table][number : number + 2]
    for name in COMPARED[table]:
        for (start, end), shard in zip(pairwise(files.starts[name]), files.shards[name], strict=True):
            if start < high and end > low:
                yield start, shard


def _misnumbered(rows: pa.Table, files: Files, table: str, number: int) -> list[str]:
    expected = np.arange(*files.starts[table][number : number + 2])
    path = files.shards[table][number].path
    return [] if np.array_equal(rows["index"].to_numpy(), expected) else [f"{path} does not hold the indices that it should"]


def _pairs(rows: pa.Table) -> Indices:
    """Each pair of a user and an item as one number."""
    column = rows["items"].combine_chunks()
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    users = np.repeat(rows["index"].to_numpy().astype(np.int64), lengths)
    pairs: Indices = users << 32 | column.flatten().to_numpy().astype(np.int64)
    return pairs


def _shown(values: pa.Array, spec: FeatureSpec) -> Any:
    """Which codes there are, a bit each; or of numbers how many, and by element sum, sum of squares, least and largest."""
    if spec.vocabulary is not None:
        codes = values.flatten() if spec.kind == "tags" else values.drop_null()
        seen = np.zeros(spec.size, dtype=bool)
        seen[codes.to_numpy(zero_copy_only=False)] = True
        return np.packbits(seen)
    if spec.kind != "numeric" or spec.scale is None:
        return None
    matrix = values.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, spec.size)
    if not len(matrix):
        return None
    return len(matrix), matrix.sum(0), (matrix**2).sum(0), matrix.min(0), matrix.max(0)


def _unlearned(spec: FeatureSpec, summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a feature does not come from the training entities, as it is in the files."""
    shown = [summary[spec.name] for summary in summaries if summary[spec.name] is not None]
    if spec.vocabulary is not None:
        seen = np.unpackbits(np.bitwise_or.reduce(shown), count=spec.size)
        strange = int(spec.size - seen.sum())
        return [f"{strange} codes of {spec.name} are of no training entity"] if strange else []
    if not shown:
        return []
    count = sum(part[0] for part in shown)
    mean, square = sum(part[1] for part in shown) / count, sum(part[2] for part in shown) / count
    low, high = np.min([part[3] for part in shown], axis=0), np.max([part[4] for part in shown], axis=0)
    standard = (np.abs(mean) < TOLERANCE) & ((np.abs(square - mean**2 - 1) < TOLERANCE) | (low == high))
    minmax = (np.abs(low) < TOLERANCE) & ((np.abs(high - 1) < TOLERANCE) | (low == high))
    return [] if (standard | minmax).all() else [f"the scale of {spec.name} is not that of the training entities"]
