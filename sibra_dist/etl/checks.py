"""Checks of a dataset as it was written, before it is published: every shard is whole, and nothing held out shows in training.

The shards are read back from where everyone will read them, each by a Spark task of its own, with nothing of Spark's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
class Task:
    """One shard, and those it is compared with."""

    place: Place
    table: str
    shard: Shard
    start: int
    """Rows of the table that come before."""
    others: Mapping[str, tuple[Shard, ...]]
    specs: tuple[FeatureSpec, ...]
    """The features, if it is a shard of users or items."""


def check_written(spark: SparkSession, place: Place, manifest: Manifest, fitted_here: bool) -> None:
    """Check that every shard is whole, and that nothing of what is held out shows in training.

    No held-out pair is in a training history or in the other held-out split, entities that are new in a later split have no
    history, and codes and scales come from training entities.

    Args:
        spark: the session.
        place: where the shards are.
        manifest: what was written, and not published yet.
        fitted_here: whether codes and scales were fitted here and not for a dataset that this one extends.

    Raises:
        DatasetError: a shard is not what was written.
        AssertionError: a defect of this package; the dataset must not be published.
    """
    tasks = []
    for table, shards in manifest.shards.items():
        starts = [0, *accumulate(shard.rows for shard in shards)]
        others = {name: manifest.shards[name] for name in COMPARED.get(table, ())}
        specs = manifest.user_features if table == "users" else manifest.item_features if table == "items" else ()
        tasks += [Task(place, table, shard, start, others, specs) for start, shard in zip(starts, shards, strict=False)]
    checked = spark.sparkContext.parallelize(tasks, len(tasks)).map(check_shard).collect()
    faults = [fault for found, _ in checked for fault in found]
    if fitted_here:
        for side, specs in (("users", manifest.user_features), ("items", manifest.item_features)):
            shown = [summary for task, (_, summary) in zip(tasks, checked, strict=True) if task.table == side]
            faults += [fault for spec in specs for fault in _unlearned(spec, shown)]
    assert not faults, f"{len(faults)} defects in what was written: {'; '.join(faults[:3])}"


def check_shard(task: Task) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a shard, and what the training entities in it show of each feature; runs in a Spark worker."""
    rows = read_verified_shard(task.place, task.shard)
    faults: list[str] = []
    if task.table in ("users", "items"):
        faults += _misnumbered(rows, task)
        training = rows.filter(pc.equal(rows["split"], "train"))
        return faults, {spec.name: _shown(training[spec.name].combine_chunks(), spec) for spec in task.specs}
    if task.table.startswith("histories/"):
        faults += _misnumbered(rows, task)
        for start, other in _overlapping(task, rows):
            splits = read_shard(task.place, other, ["split"])["split"].slice(max(task.start - start, 0))
            first = max(start - task.start, 0)
            held = pc.and_(pc.not_equal(splits, "train").combine_chunks().slice(0, rows.num_rows - first), True)
            listed = rows.column(1).slice(first, len(held)).is_valid()
            known = pc.sum(pc.and_(held, listed.combine_chunks())).as_py() or 0
            if known:
                faults.append(f"{known} entities that {task.shard.path} should not know have training histories")
    if task.table.startswith("held_out/"):
        mine = _pairs(rows)
        for _, other in _overlapping(task, rows):
            theirs = _pairs(read_shard(task.place, other, ["index", "items"]))
            shared = np.intersect1d(mine, theirs, assume_unique=True).size
            if shared:
                faults.append(f"{shared} pairs of {task.shard.path} are in {other.path}")
    return faults, {}


def _overlapping(task: Task, rows: pa.Table) -> Iterator[tuple[int, Shard]]:
    """The shards that may speak of the same indices, and the index of the first row of each, where rows are dense."""
    if rows.num_rows == 0:
        return
    low, high = rows["index"][0].as_py(), rows["index"][-1].as_py()
    for name, shards in task.others.items():
        start = 0
        for shard in shards:
            # Of held-out tables only users with something held out have rows, so that rows do not tell the index.
            if name.startswith("held_out/") or (start <= high and start + shard.rows > low):
                yield start, shard
            start += shard.rows


def _misnumbered(rows: pa.Table, task: Task) -> list[str]:
    expected = np.arange(task.start, task.start + task.shard.rows)
    right = rows.num_rows == task.shard.rows and np.array_equal(rows["index"].to_numpy(), expected)
    return [] if right else [f"{task.shard.path} does not hold the indices from {task.start} on"]


def _pairs(rows: pa.Table) -> Indices:
    """Each pair of a user and an item as one number."""
    column = rows["items"].combine_chunks()
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    users = np.repeat(rows["index"].to_numpy().astype(np.int64), lengths)
    pairs: Indices = users << 32 | column.flatten().to_numpy().astype(np.int64)
    return pairs


def _shown(values: pa.Array, spec: FeatureSpec) -> Any:
    """Which codes there are, or how many rows of numbers, their sum, sum of squares, least and largest by element."""
    if spec.vocabulary is not None:
        codes = values.flatten() if spec.kind == "tags" else values.drop_null()
        return np.unique(codes.to_numpy(zero_copy_only=False))
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
        strange = set(range(spec.size)) - {int(code) for codes in shown for code in codes}
        return [f"{len(strange)} codes of {spec.name} are of no training entity"] if strange else []
    if not shown:
        return []
    count = sum(part[0] for part in shown)
    mean, square = sum(part[1] for part in shown) / count, sum(part[2] for part in shown) / count
    low, high = np.min([part[3] for part in shown], axis=0), np.max([part[4] for part in shown], axis=0)
    standard = (np.abs(mean) < TOLERANCE) & ((np.abs(square - mean**2 - 1) < TOLERANCE) | (low == high))
    minmax = (np.abs(low) < TOLERANCE) & ((np.abs(high - 1) < TOLERANCE) | (low == high))
    return [] if (standard | minmax).all() else [f"the scale of {spec.name} is not that of the training entities"]
