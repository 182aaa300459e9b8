"""Users and items that a dataset does not have: they stand after its own, and a trained model embeds them as it does those.

What a model's parameters know of is the dataset's own users and items (`Entities.known`): the rows of its tables. Newcomers
are read like these, by their features and by their interactions with known entities of the other side; they have no id
embedding. Their interactions are not added to the histories of the other side, and no statistics are taken of them: what is
known stays as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr, Dataset, Entities, Feature, plain_values
from sibra_dist.data.manifest import FeatureSpec, Side

IN_NO_SPLIT = -1


@dataclass(frozen=True)
class Newcomers:
    """Users or items that are new, in their order."""

    ids: pa.Array
    """string [n]: none of them one of the dataset's"""
    features: Mapping[str, pa.Array]
    """By name, for every feature of the side: encoded, as a column of the dataset's table; null where it is absent"""
    histories: Csr
    """[n] rows of known entities of the other side"""
    weights: Tensor | None = None
    """float32 [nnz]: of each entry of `histories`; there if the dataset has weights"""


def with_newcomers(dataset: Dataset, newcomers: Mapping[Side, Newcomers]) -> Dataset:
    """The dataset with new users, new items or both after its own; its arrays that grow are copied to memory."""
    users = _joined(dataset.users, newcomers["users"]) if "users" in newcomers else dataset.users
    items = _joined(dataset.items, newcomers["items"]) if "items" in newcomers else dataset.items
    ids = {side: new.ids for side, new in newcomers.items()}
    return replace(dataset, users=users, items=items, newcomers=ids)


def _joined(known: Entities, new: Newcomers) -> Entities:
    count = len(new.ids)
    histories = known.histories
    indptr = torch.cat([histories.indptr, histories.nnz + new.histories.indptr[1:]])
    weights = None
    if known.weights is not None:
        assert new.weights is not None
        weights = torch.cat([known.weights, new.weights])
    return Entities(
        count=known.count + count,
        split=torch.cat([known.split, known.split.new_full([count], IN_NO_SPLIT)]),
        histories=Csr(indptr, torch.cat([histories.indices, new.histories.indices])),
        features={name: _longer(feature, new.features[name]) for name, feature in known.features.items()},
        weights=weights,
        newcomers=count,
    )


def _longer(known: Feature, column: pa.Array) -> Feature:
    new = feature_of(known.spec, column)
    present = torch.cat([known.present, new.present])
    if isinstance(known.values, Csr):
        assert isinstance(new.values, Csr)
        indptr = torch.cat([known.values.indptr, known.values.nnz + new.values.indptr[1:]])
        return Feature(known.spec, present, Csr(indptr, torch.cat([known.values.indices, new.values.indices])))
    assert isinstance(new.values, Tensor)
    return Feature(known.spec, present, torch.cat([known.values, new.values]))


def feature_of(spec: FeatureSpec, column: pa.Array) -> Feature:
    """A feature from an encoded column."""
    present = torch.from_numpy(column.is_valid().to_numpy(zero_copy_only=False).copy())
    if spec.kind == "tags":
        return Feature(spec, present, csr_of(column))
    return Feature(spec, present, torch.from_numpy(plain_values(spec, column)))


def csr_of(column: pa.Array) -> Csr:
    """A matrix from lists of columns, null where a row is empty."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    indices = column.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    return Csr(torch.from_numpy(np.concatenate([[0], lengths.cumsum()])), torch.from_numpy(indices))
