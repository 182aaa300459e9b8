"""Values: what the columns of a table of newcomers hold, as the encoders of features read it. Arrow and NumPy only.

The rules are those by which `sibra-dist prepare` reads a feature of one column: `sibra_dist.etl.values` says them to Spark.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sibra_dist.data.manifest import FeatureSpec
from sibra_dist.encoding.features import lists
from sibra_dist.errors import SourceError

SEPARATOR = "|"
"""Between the elements of a list in a column of text, unless that is a JSON list."""
LARGEST = 3.4028234663852886e38
"""The largest float32, in which numbers are stored."""
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
NOT_A_NUMBER = re.compile(r"[+-]?nan", re.IGNORECASE)

Rows = npt.NDArray[np.bool_]


def ids_of(column: pa.Array, told: str) -> pa.Array:
    """Ids as text, null where there is none.

    Raises:
        SourceError: the column, which `told` names, is of another type.
    """
    if not (_is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise _misfit(told, column.type, "an id is text or a whole number")
    texts = column.cast(pa.string())
    return pc.if_else(pc.not_equal(pc.ascii_trim(texts, " "), ""), texts, pa.scalar(None, pa.string()))


def lists_of(column: pa.Array, told: str) -> pa.Array:
    """Lists of text, list<string>: a list's elements, or what `SEPARATOR` parts; without nulls and empty elements.

    A list of which nothing is left is null. Raises:
        SourceError: the column, which `told` names, is neither text nor lists.
    """
    if _is_text(column.type) or pa.types.is_null(column.type):
        column = pa.array([None if text is None else split(text) for text in column.to_pylist()], pa.list_(pa.string()))
    elif not _is_list(column.type):
        raise _misfit(told, column.type, f"it should hold lists, or text with {SEPARATOR} between the elements")
    rows, elements = _flat(column)
    texts = _as_text(elements, column.type, told, "its elements should be texts or numbers")
    kept = pc.fill_null(pc.not_equal(texts, ""), False)
    return lists(rows[kept.to_numpy(zero_copy_only=False)], texts.filter(kept), len(column))


def numbers_of(column: pa.Array, told: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], Rows]:
    """Numbers, or lists of them: the row of each number, ascending, the numbers, and which of them cannot be read.

    A gap is NaN: a null, an empty text, and what says so itself. A number that cannot be read is infinite. A text holds the
    elements of a list, as in `lists_of`.

    Raises:
        SourceError: the column, which `told` names, holds something else.
    """
    if _is_text(column.type):
        rows, numbers = [], []
        for row, text in enumerate(column.to_pylist()):
            parts = [] if text is None or not text.strip(" ") else split(text)
            rows += [row] * len(parts)
            numbers += [number_in(part) for part in parts]
        flat, owners = np.array(numbers, np.float64), np.array(rows, np.int64)
    else:
        elements, owners = column, np.arange(len(column))
        if _is_list(column.type):
            owners, elements = _flat(column)
        kind = elements.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)):
            raise _misfit(told, column.type, "it should hold numbers")
        flat = elements.cast(pa.float64()).to_numpy(zero_copy_only=False)
    # -0.0 is 0.0, as in a dataset.
    flat = flat + 0.0
    return owners, flat, np.abs(flat) > LARGEST


def feature_values(column: pa.Array, spec: FeatureSpec, told: str) -> tuple[pa.Array, Rows, Rows]:
    """The values of a feature as its encoder reads them, null where it is absent.

    Args:
        column: what a table holds of it.
        spec: the feature.
        told: names the column, for errors.

    Returns:
        The values (category and text: string; tags: list<string>; numeric and vector: list<double>); which rows hold a
        number that cannot be read; and which hold another number of them than the feature has.

    Raises:
        SourceError: the column is of a type that the feature cannot have.
    """
    none = np.zeros(len(column), bool)
    if spec.encoder is not None:
        texts = _as_text(column, column.type, told, "it should hold texts, which are encoded as those of the dataset were")
        return _unless_empty(pc.utf8_trim(texts, " ")), none, none
    if spec.kind == "category":
        kind = column.type
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise _misfit(told, kind, "a category is text, a whole number or true/false")
        return _unless_empty(column.cast(pa.string())), none, none
    if spec.kind == "tags":
        return lists_of(column, told), none, none
    rows, numbers, unreadable = numbers_of(column, told)
    absent, bad = none.copy(), none.copy()
    absent[rows[np.isnan(numbers)]] = True
    bad[rows[unreadable]] = True
    bad &= ~absent
    lengths = np.bincount(rows, minlength=len(column))
    uneven = (lengths != spec.size) & (lengths > 0) & ~absent & ~bad
    used = ~(absent | bad | uneven)[rows]
    return lists(rows[used], numbers[used], len(column)), bad, uneven


def split(text: str) -> Sequence[str | None]:
    """The elements of a list that is a text: a JSON list, or what `SEPARATOR` parts."""
    if text.lstrip(" ").startswith("["):
        try:
            return [None if part is None else part if isinstance(part, str) else json.dumps(part) for part in json.loads(text)]
        except ValueError:
            pass
    return text.split(SEPARATOR)


def number_in(text: str | None) -> float:
    """The number in decimals that a text is; NaN where it is a gap, infinite where it is something else."""
    digits = (text or "").strip(" ")
    if not digits or NOT_A_NUMBER.fullmatch(digits):
        return float("nan")
    return float(digits) if DECIMAL.fullmatch(digits) else float("inf")


def _flat(column: pa.Array) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """The elements of lists, and the row of each."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    return np.repeat(np.arange(len(column)), lengths), column.drop_null().flatten()


def _as_text(values: pa.Array, kind: pa.DataType, told: str, expected: str) -> pa.Array:
    try:
        return values.cast(pa.string())
    except pa.ArrowException as error:
        raise _misfit(told, kind, expected) from error


def _unless_empty(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.not_equal(texts, ""), texts, pa.scalar(None, pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _misfit(told: str, kind: pa.DataType, expected: str) -> SourceError:
    return SourceError(f"column {told} has type {kind}: {expected}")
