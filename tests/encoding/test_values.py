"""What the columns of a table hold, as the encoders of features read it."""

import math
from typing import Any

import pyarrow as pa
import pytest

from sibra_dist.data.manifest import FeatureSpec
from sibra_dist.encoding.values import feature_values, ids_of
from sibra_dist.errors import SourceError

CATEGORY = FeatureSpec(name="x", kind="category", size=2, vocabulary=("a", "b"), missing=0)
TAGS = CATEGORY.model_copy(update={"kind": "tags"})
NUMBER = FeatureSpec(name="x", kind="numeric", size=1, missing=0)
PAIR = FeatureSpec(name="x", kind="vector", size=2, missing=0)
TEXT = FeatureSpec(name="x", kind="vector", size=2, missing=0, encoder={"type": "hashing", "size": 2})


@pytest.mark.parametrize(
    ("spec", "column", "expected"),
    [
        (CATEGORY, ["a", "", None, " "], ["a", None, None, " "]),
        (CATEGORY, [7, None], ["7", None]),
        (CATEGORY, [True, False], ["true", "false"]),
        (CATEGORY, [None, None], [None, None]),
        (TAGS, ["b|a||a", "", None, '["a|b", null, 3]', "[a"], [["b", "a", "a"], None, None, ["a|b", "3"], ["[a"]]),
        (TAGS, [["b", None, ""], [], None], [["b"], None, None]),
        (TAGS, [[1, 2]], [["1", "2"]]),
        (NUMBER, ["1.5", " -2e1 ", "", "nan", None], [[1.5], [-20.0], None, None, None]),
        (NUMBER, [1, None], [[1.0], None]),
        (NUMBER, [math.nan, 2.5], [None, [2.5]]),
        (PAIR, ["1|2", "[1, 2]", "1|", None], [[1.0, 2.0], [1.0, 2.0], None, None]),
        (PAIR, [[1, 2], [None, 2], [], None], [[1.0, 2.0], None, None, None]),
        (TEXT, ["  a tale ", " ", None], ["a tale", None, None]),
    ],
)
def test_values_are_read_as_those_of_a_dataset(spec: FeatureSpec, column: list[Any], expected: list[Any]) -> None:
    values, bad, uneven = feature_values(pa.array(column), spec, "x of table")
    assert values.to_pylist() == expected
    assert not bad.any()
    assert not uneven.any()
    sliced, _, _ = feature_values(pa.array([*column, *column]).slice(len(column)), spec, "x of table")
    assert sliced.to_pylist() == expected


@pytest.mark.parametrize("text", ["one", "1e39", "0x1p3", "1d", "inf", "--1", "1_0", "٣"])
def test_what_is_no_number_is_told_from_a_gap(text: str) -> None:
    values, bad, uneven = feature_values(pa.array(["1", text, ""]), NUMBER, "x of table")
    assert values.to_pylist() == [[1.0], None, None]
    assert bad.tolist() == [False, True, False]
    assert not uneven.any()


def test_another_number_of_numbers_is_told() -> None:
    _, bad, uneven = feature_values(pa.array([[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]), PAIR, "x of table")
    assert uneven.tolist() == [True, False, True]
    assert not bad.any()


@pytest.mark.parametrize(
    ("spec", "column", "expected"),
    [
        (CATEGORY, [1.5], "a category is text, a whole number or true/false"),
        (TAGS, [1], "it should hold lists"),
        (TAGS, [[{"a": 1}]], "its elements should be texts or numbers"),
        (PAIR, [{"a": 1}], "it should hold numbers"),
        (PAIR, [["1", "2"]], "it should hold numbers"),
        (TEXT, [["a"]], "it should hold texts"),
        (TEXT, [{"a": 1}], "it should hold texts"),
        (TEXT, [b"\xff"], "it should hold texts"),
    ],
)
def test_a_column_of_another_type_is_refused(spec: FeatureSpec, column: list[Any], expected: str) -> None:
    with pytest.raises(SourceError, match=rf"column x of table has type .*: {expected}"):
        feature_values(pa.array(column), spec, "x of table")


def test_ids_are_text_or_whole_numbers() -> None:
    assert ids_of(pa.array([7, None]), "id").to_pylist() == ["7", None]
    assert ids_of(pa.array(["a", " ", " b"]), "id").to_pylist() == ["a", None, " b"]
    with pytest.raises(SourceError, match="column id has type double: an id is text or a whole number"):
        ids_of(pa.array([1.5]), "id")
