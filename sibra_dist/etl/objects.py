"""Objects of JSON, of which every value is kept as it is written: a number has its digits, a list its text."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

NOT_AN_OBJECT = "not a JSON object"

_SPACE = r"[ \t\r\n]*+"
_KEY = _SPACE + r'"([^"\\]*+(?:\\.[^"\\]*+)*)"' + _SPACE + ":" + _SPACE
_FIRST_KEY, _NEXT_KEY = re.compile(rf"{_SPACE}\{{{_KEY}"), re.compile(rf"{_SPACE},{_KEY}")
_scan = json.JSONDecoder().raw_decode


class _Number(str):
    """A number as it is written."""


_decode = json.JSONDecoder(parse_float=_Number, parse_int=_Number, parse_constant=_Number).decode


def texts_of(line: str, names: Iterable[str]) -> list[str | None] | None:
    """The members of an object that have the names, or the dotted names of members of objects within it.

    A string is what it stands for, anything else is the JSON that stands there; null and what is not there are None.

    Returns:
        None if the line is no JSON, or anything but an object, or a string in it is no Unicode.
    """
    members = _object(line)
    if members is None:
        return None
    texts: list[str | None] = []
    for name in names:
        path, value = ([name], members.get(name)) if "." not in name else _found(members, name)
        if value is None or isinstance(value, str):
            texts.append(value)
        elif isinstance(value, bool):
            texts.append("true" if value else "false")
        else:
            texts.append(_written(line, path))
    try:
        # JSON can write half of a surrogate pair, and nothing can store it.
        "".join(filter(None, texts)).encode()
    except UnicodeEncodeError:
        return None
    return texts


def names_in(line: str) -> list[str]:
    """The names by which `texts_of` knows the members of an object, and of the objects in it; none if it is no object."""
    return list(_names(_object(line) or {}))


def _object(line: str) -> dict[str, object] | None:
    try:
        members = _decode(line)
    except (ValueError, RecursionError):
        return None
    return members if isinstance(members, dict) else None


def _names(members: Mapping[str, object]) -> Iterator[str]:
    for name, value in members.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _names(value))


def _found(members: Mapping[str, object], name: str) -> tuple[Sequence[str], object]:
    """The keys that lead to a value, and the value; None where there is none. A key may have dots itself."""
    if name in members:
        return [name], members[name]
    for dot in re.finditer(r"\.", name):
        within = members.get(name[: dot.start()])
        if isinstance(within, dict):
            keys, value = _found(within, name[dot.end() :])
            if keys:
                return [name[: dot.start()], *keys], value
    return [], None


def _written(text: str, path: Iterable[str]) -> str:
    """The JSON that stands at the end of a path in the JSON of an object. Of two equal keys the second counts."""
    for wanted in path:
        within, key = text, _FIRST_KEY.match(text)
        while key is not None:
            _, end = _scan(within, key.end())
            if wanted == (json.loads(f'"{key[1]}"') if "\\" in key[1] else key[1]):
                text = within[key.end() : end]
            key = _NEXT_KEY.match(within, end)
    return text
