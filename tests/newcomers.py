"""Users and items of a dataset told as a table of newcomers tells them, under other ids."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sibra_dist.data.dataset import Dataset
from sibra_dist.data.manifest import Side, read_shard
from sibra_dist.data.results import ID_COLUMNS
from sibra_dist.recommending.newcomers import INTERACTIONS, WEIGHTS


def column(dataset: Dataset, table: str, name: str) -> list[Any]:
    """A column of one of the dataset's tables."""
    shards = dataset.manifest.shards[table]
    return pa.concat_tables([read_shard(dataset.place, shard, [name]) for shard in shards])[name].to_pylist()


def told_again(dataset: Dataset, side: Side, entities: Sequence[int]) -> pa.Table:
    """What a dataset knows of some users or items, with their ids after "new "."""
    other: Side = "items" if side == "users" else "users"
    ids, others = dataset.ids(side).to_pylist(), dataset.ids(other).to_pylist()
    columns: dict[str, list[Any]] = {ID_COLUMNS[side]: [f"new {ids[entity]}" for entity in entities]}
    for spec in dataset.manifest.features(side):
        stored = [column(dataset, side, spec.name)[entity] for entity in entities]
        words = spec.vocabulary
        if spec.kind == "category" and words is not None:
            stored = [None if code is None else words[code] for code in stored]
        if spec.kind == "tags" and words is not None:
            stored = [None if codes is None else [words[code] for code in reversed(codes)] for codes in stored]
        columns[spec.name] = stored
    histories = column(dataset, f"histories/{side}", other)
    columns[INTERACTIONS] = [
        None if histories[entity] is None else [others[number] for number in reversed(histories[entity])] for entity in entities
    ]
    if "weights" in dataset.manifest.interaction_columns:
        weights = column(dataset, f"histories/{side}", "weights")
        columns[WEIGHTS] = [None if weights[entity] is None else weights[entity][::-1] for entity in entities]
    return pa.table(columns)
