"""Tables of users and items that a dataset does not have, and the dataset with them, on which a trained model is seated.

A table has a column of ids, one for each feature by its name in the dataset, and one of interactions. What is not there, be
it a column or a value, is a missing modality. Values become codes and numbers as those of the dataset did, to the last bit.
"""

import csv
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch

from sibra_dist.data.dataset import Csr, Dataset
from sibra_dist.data.manifest import FeatureSpec, Side
from sibra_dist.data.newcomers import Newcomers, with_newcomers
from sibra_dist.data.results import ID_COLUMNS
from sibra_dist.encoding.features import ENCODERS, encode_vector, lists
from sibra_dist.encoding.texts import read_fitted, text_encoder
from sibra_dist.encoding.values import feature_values, ids_of, lists_of, numbers_of
from sibra_dist.errors import ConfigError, SourceError, nearest
from sibra_dist.models.base import Recommender
from sibra_dist.models.encoders import ID
from sibra_dist.recommending.listings import (
    DUPLICATE_ID,
    PARQUET,
    SEPARATORS,
    UNKNOWN_ITEM,
    UNKNOWN_USER,
    Rejected,
    content_of,
    positions,
    readable,
    suffix_of,
)
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

INTERACTIONS, WEIGHTS = "interactions", "interactions.weights"
"""Columns of a table. Neither can be the name of a feature."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
NO_ID, KNOWN_ID = "no id", "id is in the dataset already"
BAD_NUMBER, UNEVEN = "not a finite number", "not as many numbers as the feature has"
UNEVEN_WEIGHTS, BAD_WEIGHT = "weights are not one for each interaction", "weight is not a number up to 1e15"
LARGEST_WEIGHT = 1e15
TEXTS_AT_ONCE = 1024


class Given(NamedTuple):
    """A table of newcomers as it was given."""

    name: str
    """Of the file, for messages."""
    sha256: str
    rows: pa.Table


def read_table(file: str) -> Given:
    """Read a table of newcomers: `.csv` or `.tsv` with a header, `.jsonl` with an object a line, or `.parquet`.

    Every column of a `.csv` or `.tsv` is text, and an empty field is null.

    Raises:
        SourceError: it cannot be read.
    """
    content = content_of(file)
    suffix = suffix_of(file, (*SEPARATORS, *JSON_LINES, PARQUET))
    with readable(file):
        if suffix in SEPARATORS:
            rows = _read_delimited(content, SEPARATORS[suffix])
        elif suffix in JSON_LINES:
            rows = _read_json(content)
        elif suffix == PARQUET:
            rows = pq.read_table(pa.BufferReader(content))
            rows.validate(full=True)  # that text is text
        else:
            raise SourceError(f"{file} is no table of a kind that its name says: give a .csv, .tsv, .jsonl or .parquet")
    return Given(file, hashlib.sha256(content).hexdigest(), rows)


def read_tables(users: str | None, items: str | None) -> dict[Side, Given]:
    """The tables of new users and of new items that were given."""
    files: dict[Side, str | None] = {"users": users, "items": items}
    return {side: read_table(file) for side, file in files.items() if file is not None}


def join(dataset: Dataset, tables: Mapping[Side, Given]) -> tuple[Dataset, list[Rejected]]:
    """The dataset with the newcomers of tables after its own users and items, and the records that were not used.

    Raises:
        SourceError: a table has no id column, nothing that the dataset knows, a column of the wrong type, or no usable row.
        DatasetError: what was fitted for a text cannot be read.
    """
    found, refused = {}, []
    for side, given in tables.items():
        found[side], of_side = newcomers_of(given, side, dataset)
        refused += of_side
    return (with_newcomers(dataset, found) if found else dataset), refused


def require_embeddings(model: Recommender, name: str, sides: Iterable[Side]) -> None:
    """Raise a `ConfigError` if a model called `name` knows a side that has newcomers by ids alone."""
    users, items = model.modalities()
    for side in sides:
        if model.trainable and set(users if side == "users" else items) <= {ID}:
            raise ConfigError(
                f"the model {name} knows {side} by their ids alone, so it has nothing to embed new ones by; recommend with a "
                f"run whose model reads features or interactions of {side}, such as single_branch"
            )


def newcomers_of(given: Given, side: Side, dataset: Dataset) -> tuple[Newcomers, list[Rejected]]:
    """The newcomers of one side that a table tells of, in its order, and the records that were not used; see `join`."""
    table = given.rows
    _require_columns(given, side, dataset)
    count, specs = table.num_rows, dataset.manifest.features(side)
    reasons = np.full(count, "", object)

    def refuse(rows: npt.NDArray[np.bool_], reason: str) -> None:
        reasons[rows & (reasons == "")] = reason

    ids = ids_of(_column(given, ID_COLUMNS[side]), f"{ID_COLUMNS[side]} of {given.name}")
    refuse(ids.is_null().to_numpy(zero_copy_only=False), NO_ID)
    refuse(positions(ids, dataset.ids(side)) >= 0, KNOWN_ID)
    values = {}
    for spec in specs:
        values[spec.name], bad, uneven = feature_values(_column(given, spec.name), spec, f"{spec.name} of {given.name}")
        refuse(bad, BAD_NUMBER)
        refuse(uneven, UNEVEN)
    others = lists_of(_column(given, INTERACTIONS), f"{INTERACTIONS} of {given.name}")
    weights = None
    if "weights" in dataset.manifest.interaction_columns:
        owners, numbers, _ = numbers_of(_column(given, WEIGHTS), f"{WEIGHTS} of {given.name}")
        there = ~np.isnan(numbers)
        weights = lists(owners[there], numbers[there], count)
        # A gap among weights does not tell which interaction lacks one.
        gaps = np.bincount(owners[~there], minlength=count) > 0
        refuse((_lengths(weights) != _lengths(others)) | (gaps & (_lengths(others) > 0)), UNEVEN_WEIGHTS)
        refuse(np.bincount(owners[np.abs(numbers) > LARGEST_WEIGHT], minlength=count) > 0, BAD_WEIGHT)
    good = np.flatnonzero(reasons == "")
    codes = ids.take(pa.array(good)).dictionary_encode().indices.to_numpy()
    again = np.ones(len(good), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    reasons[good[again]] = DUPLICATE_ID
    used = pa.array(reasons == "")
    refused = [_refused(given, row, reasons[row]) for row in np.flatnonzero(reasons != "").tolist()]
    if len(refused) == count:
        example = f", for example: {refused[0].reason} ({','.join(refused[0].record)[:80]})" if refused else ""
        raise SourceError(f"none of the {count} rows of {given.name} can be used{example}; check that table")
    ids = ids.filter(used)
    features = {spec.name: _encoded(values[spec.name].filter(used), spec, side, dataset) for spec in specs}
    each = None if weights is None else weights.filter(used).drop_null().flatten().to_numpy()
    histories, of_histories, unknown = _histories(given.name, ids, others.filter(used), each, side, dataset)
    return Newcomers(ids, features, histories, of_histories), [*refused, *unknown]


def _encoded(values: pa.Array, spec: FeatureSpec, side: Side, dataset: Dataset) -> pa.Array:
    """The column of a feature as the dataset's table would have it."""
    if spec.encoder is None:
        return ENCODERS[spec.kind](values, spec)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    texts = values.drop_null()
    if not len(texts):
        return encode_vector(pa.nulls(len(values), pa.list_(pa.float32())), spec)
    encode = text_encoder(spec.encoder, read_fitted(dataset.place, dataset.manifest, side, spec.name))
    vectors = [encode(texts.slice(start, TEXTS_AT_ONCE)) for start in range(0, len(texts), TEXTS_AT_ONCE)]
    places = pa.array(np.cumsum(present) - 1, mask=~present)
    return encode_vector(pa.concat_arrays(vectors).take(places), spec)


def _histories(
    name: str, ids: pa.Array, others: pa.Array, weights: npt.NDArray[np.float64] | None, side: Side, dataset: Dataset
) -> tuple[Csr, torch.Tensor | None, list[Rejected]]:
    """Interactions with known entities, the weight of each, and those with unknown ones; of a pair given twice the first."""
    other: Side = "items" if side == "users" else "users"
    rows, elements = np.repeat(np.arange(len(ids)), _lengths(others)), others.drop_null().flatten()
    # Newcomers of one side are not known to those of the other.
    known = dataset.ids(other).slice(0, getattr(dataset, other).known)
    found = positions(elements, known)
    reason = UNKNOWN_ITEM if other == "items" else UNKNOWN_USER
    unknown = [
        Rejected(name, reason, (ids[int(rows[place])].as_py(), elements[place].as_py()))
        for place in np.flatnonzero(found < 0).tolist()
    ]
    there = np.flatnonzero(found >= 0)
    pairs, first = np.unique(rows[there] * len(known) + found[there], return_index=True)
    indptr = np.concatenate([[0], np.bincount(pairs // len(known), minlength=len(ids)).cumsum()]).astype(np.int64)
    histories = Csr(torch.from_numpy(indptr), torch.from_numpy((pairs % len(known)).astype(np.int32)))
    kept = None if weights is None else torch.from_numpy(weights[there[first]].astype(np.float32))
    return histories, kept, unknown


def _lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    lengths: npt.NDArray[np.int64] = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _require_columns(given: Given, side: Side, dataset: Dataset) -> None:
    names = given.rows.column_names
    features = [spec.name for spec in dataset.manifest.features(side)]
    weighted = "weights" in dataset.manifest.interaction_columns
    read = [ID_COLUMNS[side], *features, INTERACTIONS, *([WEIGHTS] if weighted else [])]
    if twice := next((name for name in read if names.count(name) > 1), None):
        raise SourceError(f"{given.name} has two columns {twice}; keep one")
    if ID_COLUMNS[side] not in names:
        raise SourceError(f"{given.name} has no column {ID_COLUMNS[side]}; {nearest(ID_COLUMNS[side], names)}")
    if not set(names) & set(read[1:]):
        raise SourceError(f"{given.name} tells nothing of its {side}: a model reads {', '.join(read[1:])}; name its columns so")
    if weighted and INTERACTIONS in names and WEIGHTS not in names:
        raise SourceError(
            f"{given.name} has {INTERACTIONS} without weights, which the dataset has: add a column {WEIGHTS}, a number for each"
        )
    if (unread := [name for name in names if name not in read]) and Ranks.current().leads:
        logger.warning("%s: no feature of %s is called %s; not read", given.name, side, ", ".join(unread))


def _column(given: Given, name: str) -> pa.Array:
    """A column in one piece; all null if it is not there."""
    if name not in given.rows.column_names:
        return pa.nulls(given.rows.num_rows)
    column = given.rows[name].combine_chunks()
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _refused(given: Given, row: int, reason: str) -> Rejected:
    cells = given.rows.slice(row, 1).to_pylist()[0].values()
    return Rejected(given.name, reason, tuple("" if cell is None else str(cell) for cell in cells))


def _read_delimited(content: bytes, separator: str) -> pa.Table:
    header = content.partition(b"\n")[0].decode("utf-8-sig").removesuffix("\r")
    names = next(csv.reader([header], delimiter=separator), [])
    return pa_csv.read_csv(
        pa.BufferReader(content),
        parse_options=pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )


def _read_json(content: bytes) -> pa.Table:
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column_of(rows, name) for name in names})


def _column_of(rows: list[dict[str, Any]], name: str) -> pa.Array:
    try:
        return pa.array([row.get(name) for row in rows])
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise ValueError(f"column {name}: {error}") from error
