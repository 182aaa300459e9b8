"""Tables of an evaluation by group of users and of items, that a person reads."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

CUTOFF = 10
ABREAST = 6
"""Metrics in a table, which 120 columns hold."""


def groups_table(result: dict[str, Any]) -> Group:
    """Tables for each grouping of users, and of items: the metrics of each group at one cutoff, and the gap between groups.

    The cutoff is 10 if there is one of 10, else the greatest; `result`, as `metrics.json` has it, tells all of them. Nothing
    where it tells of no groups.
    """
    users = [(f"users by {name.removeprefix('users.')}", ("users",), found) for name, found in result.get("groups", {}).items()]
    items = [(f"items by {name}", ("candidates", "relevant"), found) for name, found in result.get("item_groups", {}).items()]
    return Group(*(part for grouping in (*users, *items) for part in _tables(*grouping)))


def at_one_cutoff(metrics: Iterable[str]) -> list[str]:
    """The metrics `name@10`, or those at the greatest cutoff if there is none of 10; and those that have none."""
    metrics = list(metrics)
    cutoffs = {int(metric.partition("@")[2]) for metric in metrics if "@" in metric}
    cutoff = CUTOFF if CUTOFF in cutoffs else max(cutoffs, default=0)
    return [metric for metric in metrics if metric.partition("@")[2] in ("", str(cutoff))]


def _tables(title: str, counts: Sequence[str], found: dict[str, Any]) -> Iterator[Text | Table]:
    """A table of every few metrics, each after an empty line; one of the counts alone if there are no metrics."""
    shown = at_one_cutoff(found["gap"])
    for start in range(0, max(len(shown), 1), ABREAST):
        yield Text()
        yield _table(title, counts, found, shown[start : start + ABREAST])


def _table(title: str, counts: Sequence[str], found: dict[str, Any], shown: Sequence[str]) -> Table:
    figures = [Column(text, justify="right") for text in (*counts, *(metric.rpartition("/")[2] for metric in shown))]
    table = Table(Column(title, overflow="fold", min_width=12), *figures, box=None, pad_edge=False)
    for label, group in found["groups"].items():
        values = [f"{group['metrics'][metric]:.4f}" if metric in group["metrics"] else "-" for metric in shown]
        table.add_row(Text(label), *(f"{group[count]:,}" for count in counts), *values)
    if found.get("users_in_none"):
        table.add_row("in none", f"{found['users_in_none']:,}")
    if len(found["groups"]) > 1:
        table.add_row("gap", *[""] * len(counts), *(f"{found['gap'][metric]:.4f}" for metric in shown))
    return table
