"""Tables of what each modality is worth, and of how far apart they are, that a person reads."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from sibra_dist.report_groups import at_one_cutoff

ABREAST = 3
"""Metrics with their differences in a table, which 120 columns hold."""


def modalities_table(result: dict[str, Any]) -> Group:
    """Every modality hidden in turn and alone, from `modalities.json`: metrics at one cutoff and what they differ by.

    The cutoff is 10 if there is one of 10, else the greatest.
    """
    full = result["rows"][0]
    hidden = f", without {', '.join(result['hidden'])} in every row" if result["hidden"] else ""
    ranked = " (all items)" if result["candidates"] == "all" else ""
    note = (
        f"{result['split']} split{hidden}: {full['counts']['users']:,} users, "
        f"{full['counts']['candidates']:,} candidates each{ranked}; differences are to the first row"
    )
    shown = at_one_cutoff(full["metrics"])
    tables = (_rows(result["rows"], shown[start : start + ABREAST]) for start in range(0, len(shown), ABREAST))
    return Group(Text(note), *(part for table in tables for part in (Text(), table)))


def _rows(rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> Table:
    headings = [text for metric in shown for text in (metric.rpartition("/")[2], "differs")]
    table = Table(
        Column("modalities", overflow="fold", min_width=12),
        Column("left with none", justify="right"),
        *(Column(text, justify="right") for text in headings),
        box=None,
        pad_edge=False,
    )
    for row in rows:
        label = " ".join(filter(None, [row["kind"] if row["modality"] else "all", row["modality"]]))
        values = [text for metric in shown for text in _pair(row["metrics"][metric], row["differences"][metric], row["kind"])]
        table.add_row(Text(label), _left(row), *values)
    return table


def _pair(value: float, difference: float, kind: str) -> tuple[str, str]:
    return f"{value:.4f}", "" if kind == "full" else f"{difference:+.4f}"


def _left(row: dict[str, Any]) -> str:
    """How many entities of the modality's side have nothing that the model reads; of both sides in the full row."""
    sides = ("users", "items") if row["modality"] is None else (row["modality"].partition(".")[0],)
    return ", ".join(f"{row['counts'][f'{side}_without_modality']:,} {side}" for side in sides)


def gap_table(result: dict[str, Any]) -> Group:
    """The gap of every two modalities, from `modality-gap.json`: recall at cutoff 10, or else the greatest, both ways."""
    note = [f"without {', '.join(result['hidden'])}"] if result["hidden"] else []
    note.append("of modality a, how often its embedding in b is among the nearest, and the other way round")
    columns = [Column(text, overflow="fold") for text in ("side", "a", "b")]
    figures = [Column(text, justify="right") for text in ("with both", "distance", "recall", "a to b", "b to a", "by chance")]
    table = Table(*columns, *figures, box=None, pad_edge=False)
    for pair in result["pairs"]:
        table.add_row(*_gap(pair))
    return Group(Text("; ".join(note)), table)


def _gap(pair: dict[str, Any]) -> Iterator[str]:
    yield from (pair["side"], *pair["modalities"], f"{pair['entities']:,}")
    if not pair["entities"]:
        yield from ("-",) * 5
        return
    there, back = (way["metrics"] for way in pair["retrieval"])
    # The suffix of a sample is no part of the cutoff.
    names = {name.partition("/")[0]: name for name in there}
    cutoff = at_one_cutoff(names)[0]
    name, chance = names[cutoff], min(int(cutoff.partition("@")[2]) / pair["compared"], 1.0)
    yield from (f"{pair['distance']:.4f}", name.removeprefix("recall"))
    yield from (f"{value:.4f}" for value in (there[name], back[name], chance))
