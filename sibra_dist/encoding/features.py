"""Encoding: values of features to codes and numbers, of a shard or of newcomers. Arrow and NumPy only; runs in Spark's workers.

Every encoder takes the values of one feature and what was fitted for it, and null stays null: an absent feature. A kind is
a line of `ENCODERS`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sibra_dist.data.manifest import FeatureKind, FeatureSpec
from sibra_dist.errors import SourceError


def encode_category(values: pa.Array, spec: FeatureSpec) -> pa.Array:
    """Text to the code of each value: int32. What has none becomes the out-of-vocabulary code, or absent."""
    return _codes(values, spec)


def encode_tags(values: pa.Array, spec: FeatureSpec) -> pa.Array:
    """Lists of text to ascending lists of distinct codes: list<int32>. A list of which nothing is left is absent."""
    flat = _codes(values.flatten(), spec)
    rows = np.repeat(np.arange(len(values)), pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False))
    known = flat.is_valid().to_numpy(zero_copy_only=False)
    codes = flat.fill_null(0).to_numpy(zero_copy_only=False)[known]
    # One number for a row and a code: sorting these is the same as sorting by row and then by code.
    distinct = np.unique(rows[known].astype(np.int64) << 32 | codes)
    return lists(distinct >> 32, (distinct & 0xFFFFFFFF).astype(np.int32), len(values))


def encode_numeric(values: pa.Array, spec: FeatureSpec) -> pa.Array:
    """Lists of numbers, shifted and scaled: list<float32>."""
    numbers = _matrix(values, spec.size)
    if spec.offset is not None and spec.scale is not None:
        numbers = (numbers - np.array(spec.offset)) / np.array(spec.scale)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    rows = np.repeat(np.flatnonzero(present), spec.size)
    return lists(rows, numbers[present].astype(np.float32).reshape(-1), len(values))


def encode_vector(values: pa.Array, spec: FeatureSpec) -> pa.Array:
    """Lists of numbers as they are: fixed-size list<float32>."""
    present = values.is_valid().to_numpy(zero_copy_only=False)
    matrix = _matrix(values, spec.size).astype(np.float32).reshape(-1)
    kind = pa.list_(pa.float32(), spec.size)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix), type=kind, mask=pa.array(~present))


ENCODERS: dict[FeatureKind, Callable[[pa.Array, FeatureSpec], pa.Array]] = {
    "category": encode_category,
    "tags": encode_tags,
    "numeric": encode_numeric,
    "vector": encode_vector,
}


def lists(rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any], count: int) -> pa.Array:
    """A list array of `count` rows from values and the ascending row of each; a row without values is null."""
    if len(values) >= 1 << 31:
        raise SourceError(
            "the lists of one shard have more than 2**31 elements; set history.max_length, or a smaller shard_mebibytes"
        )
    lengths = np.bincount(rows, minlength=count) if len(rows) else np.zeros(count, np.int64)
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(lengths == 0))


def _codes(values: pa.Array, spec: FeatureSpec) -> pa.Array:
    assert spec.vocabulary is not None
    codes = pc.index_in(values, pa.array(spec.vocabulary, pa.string()), skip_nulls=True)
    if spec.vocabulary and spec.vocabulary[0] is None:
        codes = pc.if_else(values.is_valid(), codes.fill_null(0), codes)
    return codes


def _matrix(values: pa.Array, size: int) -> np.ndarray[Any, Any]:
    """Lists of `size` numbers each as the rows of a matrix of float64; zero where there is no list."""
    matrix = np.zeros((len(values), size), np.float64)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    matrix[present] = values.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(int(present.sum()), size)
    return matrix
