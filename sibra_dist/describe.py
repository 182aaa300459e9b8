"""What a dataset is like: sizes, cold shares, lengths of histories, who has which modality, what was left out.

The manifest knows what became of the records; all else is counted in the memory-mapped arrays of `open_dataset`, without Spark.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sibra_dist.data.dataset import SPLITS, Dataset, HeldOut, open_dataset
from sibra_dist.data.manifest import TABLES, FeatureSpec, Manifest, Side
from sibra_dist.data.storage import Place
from sibra_dist.description import (
    Cold,
    Density,
    Description,
    EntitiesDescription,
    Head,
    HeldOutDescription,
    HistoryLengths,
    Modality,
    Popularity,
    Shares,
    Storage,
    TableSize,
    Times,
    Weights,
    WithoutModality,
)
from sibra_dist.errors import DatasetError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
BLOCK = 1 << 22
"""Entries of a sparse matrix that are looked up at a time: an index of 8 bytes each is made for them."""


def describe(place: str | Path | Place, cache: Path | None = None) -> Description:
    """Look at the dataset in folder `place`; the `model_dump` of what comes of it is what `sibra-dist describe --json` prints.

    An entity is a user or an item. It is cold if it has no training interaction, else warm. A share is a number from 0 to 1,
    and null where it would be one of nothing. Sizes are in bytes. These are the keys:

        name, place, digest, format_version, package_version
        extends                     digest of the dataset whose indices this one continues, or null
        protocol                    name, seed, validation, test: as they were asked for
        counts                      users, items; interactions in train, validation, test
        shares                      of the interactions in train, validation, test
        density                     interactions over users x items: train those for training, all those of every split
        weights                     min, mean, max over training interactions, or null
        times                       earliest, latest of the training interactions: dates in UTC, or null
        users, items                for either side
          cold                      count, share; first in the split validation, or test; others are in the split train
          history_lengths           training interactions of each of the entities that have any (null if none has): min, max,
                                    mean, and p1, p10, p25, p50, p75, p90, p99: the least length such that so many percent
                                    of those entities have no more
          modalities                by name, `interactions` first, then the features
            kind, size              of interactions: entities of the other side; category, tags: codes; else the length
            present, share          entities that have it
            share_of_cold           share of the cold entities that have it
            unknown                 category, tags: values met that no code of their own stands for; else null
            unknown_code            category, tags: whether one code stands for these together; else null
          without_modality          count, share of entities that have none of these
        held_out                    of either split, validation and test
          users                     that hold something out
          candidates                items that are ranked
          interactions              all, then divided by whether their user and their item are cold: warm (neither),
                                    cold_item, cold_user (only the one), cold_both
        popularity                  of the items that have training interactions, which are so many items; null if none has
          top_1_percent             the most popular hundredth of them, rounded up to so many items, and the share of all
                                    training interactions that are with these
          top_20_percent            likewise
        records                     read, rejected (by reason), filtered (by step), kept
        rejected_side_information   by reason
        storage                     bytes, shards: of all tables
          tables                    by name: rows, bytes, shards, and the bytes of smallest_shard and largest_shard

    Args:
        place: the dataset folder: a path, or a URI such as `s3://bucket/folder`.
        cache: where decoded arrays are kept; by default `sibra_dist.data.cache.default_cache()`.

    Raises:
        DatasetError: no dataset is there, it is damaged, or a newer version wrote it.
    """
    dataset = open_dataset(place, cache)
    manifest, counts = dataset.manifest, dataset.manifest.counts
    pairs, interactions = counts.users * counts.items, counts.train + counts.validation + counts.test
    cold_users, cold_items = dataset.users.histories.lengths() == 0, dataset.items.histories.lengths() == 0
    return Description(
        name=manifest.name,
        place=str(dataset.place),
        digest=manifest.digest,
        format_version=manifest.format_version,
        package_version=manifest.package_version,
        extends=manifest.extends,
        protocol=manifest.protocol,
        counts=counts,
        shares=Shares(
            train=share_of(counts.train, interactions),
            validation=share_of(counts.validation, interactions),
            test=share_of(counts.test, interactions),
        ),
        density=Density(train=share_of(counts.train, pairs), all=share_of(interactions, pairs)),
        weights=_weights(dataset),
        times=_times(dataset.users.times),
        users=_entities(dataset, "users", cold_users),
        items=_entities(dataset, "items", cold_items),
        held_out={split: _held_out(dataset, split, cold_users, cold_items) for split in dataset.held_out},
        popularity=_popularity(dataset.items.histories.lengths()),
        records=manifest.records,
        rejected_side_information=manifest.rejected_side_information,
        storage=_storage(manifest),
    )


def share_of(part: int, whole: int) -> float | None:
    """`part` over `whole`; None of nothing."""
    return part / whole if whole else None


def modality(spec: FeatureSpec, present: int, count: int, share_of_cold: float | None = None) -> Modality:
    """A feature that `present` of `count` entities have."""
    coded = spec.vocabulary is not None
    return Modality(
        kind=spec.kind,
        size=spec.size,
        present=present,
        share=share_of(present, count),
        share_of_cold=share_of_cold,
        unknown=spec.unknown if coded else None,
        unknown_code=None in spec.vocabulary[:1] if spec.vocabulary is not None else None,
    )


def _entities(dataset: Dataset, side: Side, cold: Tensor) -> EntitiesDescription:
    entities, other = (dataset.users, dataset.items) if side == "users" else (dataset.items, dataset.users)
    count, num_cold = entities.count, int(cold.sum())
    modalities = {
        "interactions": Modality(
            kind="interactions",
            size=other.count,
            present=count - num_cold,
            share=share_of(count - num_cold, count),
            share_of_cold=share_of(0, num_cold),
            unknown=None,
            unknown_code=None,
        )
    }
    without = cold.clone()
    for name, feature in entities.features.items():
        share_of_cold = share_of(int((feature.present & cold).sum()), num_cold)
        modalities[name] = modality(feature.spec, int(feature.present.sum()), count, share_of_cold)
        without &= ~feature.present
    others, validation, test = (int((cold & (entities.split == code)).sum()) for code in range(len(SPLITS)))
    return EntitiesDescription(
        cold=Cold(count=num_cold, share=share_of(num_cold, count), validation=validation, test=test, others=others),
        history_lengths=_history_lengths(entities.histories.lengths()),
        modalities=modalities,
        without_modality=WithoutModality(count=int(without.sum()), share=share_of(int(without.sum()), count)),
    )


def _history_lengths(lengths: Tensor) -> HistoryLengths | None:
    found = lengths[lengths > 0].numpy()
    if len(found) == 0:
        return None
    # In whole numbers, so that no rounding of a product moves its ceiling.
    places = {percent: -(-percent * len(found) // 100) - 1 for percent in PERCENTILES}
    ordered = np.partition(found, sorted(set(places.values())))
    return HistoryLengths(
        entities=len(found),
        min=int(found.min()),
        max=int(found.max()),
        mean=int(found.sum()) / len(found),
        **{f"p{percent}": int(ordered[place]) for percent, place in places.items()},
    )


def _held_out(dataset: Dataset, split: HeldOut, cold_users: Tensor, cold_items: Tensor) -> HeldOutDescription:
    holders, held = dataset.held_out[split]
    item_is_cold = torch.cat([cold_items[block.long()] for block in held.indices.split(BLOCK)])
    user_is_cold = torch.from_numpy(np.repeat(cold_users[holders.long()].numpy(), held.lengths().numpy()))
    both = int((item_is_cold & user_is_cold).sum())
    cold_item, cold_user = int(item_is_cold.sum()) - both, int(user_is_cold.sum()) - both
    return HeldOutDescription(
        users=len(holders),
        candidates=len(dataset.candidates(split)),
        interactions=held.nnz,
        warm=held.nnz - both - cold_item - cold_user,
        cold_item=cold_item,
        cold_user=cold_user,
        cold_both=both,
    )


def _popularity(lengths: Tensor) -> Popularity | None:
    found = lengths[lengths > 0].sort(descending=True).values
    if len(found) == 0:
        return None

    def head(percent: int) -> Head:
        items = -(-percent * len(found) // 100)
        return Head(items=items, share=int(found[:items].sum()) / int(found.sum()))

    return Popularity(items=len(found), top_1_percent=head(1), top_20_percent=head(20))


def _weights(dataset: Dataset) -> Weights | None:
    weights = dataset.users.weights
    if weights is None or len(weights) == 0:
        return None
    mean = float(weights.sum(dtype=torch.float64)) / len(weights)
    if not math.isfinite(mean):
        raise DatasetError(f"{dataset.place} is damaged: not every weight is a finite number. Prepare the dataset again")
    return Weights(min=float(weights.min()), mean=mean, max=float(weights.max()))


def _times(times: Tensor | None) -> Times | None:
    if times is None or len(times) == 0:
        return None
    # Numpy's dates, because Python's end with the year 9999.
    earliest, latest = (str(np.datetime64(int(time), "ms").astype("datetime64[D]")) for time in times.aminmax())
    return Times(earliest=earliest, latest=latest)


def _storage(manifest: Manifest) -> Storage:
    tables = {}
    for name in (*TABLES, *sorted(manifest.shards.keys() - set(TABLES))):
        shards = manifest.shards[name]
        sizes = [shard.bytes for shard in shards]
        tables[name] = TableSize(
            rows=sum(shard.rows for shard in shards),
            bytes=sum(sizes),
            shards=len(sizes),
            smallest_shard=min(sizes, default=0),
            largest_shard=max(sizes, default=0),
        )
    total, shards_in_all = sum(table.bytes for table in tables.values()), sum(table.shards for table in tables.values())
    return Storage(bytes=total, shards=shards_in_all, tables=tables)
