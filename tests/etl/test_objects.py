"""JSON taken apart, against Python's own parser."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.etl.objects import names_in, texts_of

# A line, and the values of `a`, `b`, `c` and `d.e` in it; None where it is no object.
LINES: dict[str, tuple[str | None, ...] | None] = {
    '{"a": 1.50e3, "b": "x\\u00e9\\n", "c": [1, 2.0, "q"], "d": {"e":  1999}}': ("1.50e3", "xé\n", '[1, 2.0, "q"]', "1999"),
    '  {"a":12345678901234567890.10, "b" : true, "d": {"e": {"f": [ ]}}}\t': (
        "12345678901234567890.10",
        "true",
        None,
        '{"f": [ ]}',
    ),
    '{"a": null, "b": false, "d": 3}': (None, "false", None, None),
    '{"a": NaN, "b": -Infinity, "c": ""}': ("NaN", "-Infinity", "", None),
    '{"\\u0061": [1], "a": [2.0], "d.e": {"x": 1}, "d": {"e": 2}}': ("[2.0]", None, None, '{"x": 1}'),
    '{"d": {"e": "\\ud83d\\ude00"}, "c": {"e\\"": "}"}}': (None, None, '{"e\\"": "}"}', "😀"),
    "{}": (None, None, None, None),
    "": None,
    '{"a": 1} x': None,
    '{"a": 1}, {"a": 2}': None,
    '[{"a": 1}]': None,
    "5": None,
    "null": None,
    "{'a': 1}": None,
    '{"a": 1,}': None,
    '{"a": 01}': None,
    '{"a": 1': None,
    '{"a": "x\ty"}': None,
    '{"a": "\\ud800"}': None,
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": None,
}

texts = st.text(max_size=8)
keys = st.sampled_from(["a", "b", 'q"', "\\", "a.b", "é"])
nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_values_are_kept_as_they_are_written(line: str) -> None:
    found = texts_of(line, ["a", "b", "c", "d.e"])
    assert (None if found is None else tuple(found)) == LINES[line]


@given(st.dictionaries(keys, nested, max_size=4), st.booleans())
def test_every_value_means_what_it_meant(members: dict[str, object], ascii_only: bool) -> None:
    line = json.dumps(members, ensure_ascii=ascii_only)
    names = list(dict.fromkeys(names_in(line)))
    assert set(members) <= set(names)
    found = dict(zip(names, texts_of(line, names) or [], strict=True))
    for name, value in members.items():
        text = found[name]
        if value is None or isinstance(value, str):
            assert text == value
        else:
            assert text is not None
            assert json.dumps(json.loads(text)) == json.dumps(value)


@given(st.dictionaries(keys, st.dictionaries(keys, texts, min_size=1), min_size=1))
def test_a_dotted_name_leads_to_the_value_within(members: dict[str, dict[str, str]]) -> None:
    line = json.dumps(members)
    for outer, within in members.items():
        for inner, value in within.items():
            name = f"{outer}.{inner}"
            if name.count(".") == 1 and name not in members:  # else there is more than one way to read it
                assert texts_of(line, [name]) == [value]
                assert name in names_in(line)
