"""What a person reads of modalities."""

import io
from typing import Any

from rich.console import Console, RenderableType

from sibra_dist.report_modalities import gap_table, modalities_table


def shown(table: RenderableType) -> list[list[str]]:
    """The words of each line as they are printed."""
    file = io.StringIO()
    Console(file=file, width=120, highlight=False, markup=False, emoji=False).print(table, soft_wrap=True)
    return [line.split() for line in file.getvalue().splitlines()]


def row(kind: str, modality: str | None, *values: float) -> dict[str, Any]:
    names = [f"test/{name}@{cutoff}" for name in ("ndcg", "recall", "map", "mrr", "f1") for cutoff in (5, 10)]
    metrics = dict(zip(names, values * 5, strict=True))
    counts = {"users": 1200, "candidates": 80, "users_without_modality": 3, "items_without_modality": 1500}
    differences = {name: value - 0.5 for name, value in metrics.items()}
    return {"kind": kind, "modality": modality, "counts": counts, "metrics": metrics, "differences": differences}


def test_modalities_at_cutoff_10_with_differences_in_as_many_tables_as_it_takes() -> None:
    rows = [row("full", None, 0.9, 0.5), row("without", "users.club", 0.9, 0.25), row("only", "items.cover", 0.9, 0.75)]
    result = {"split": "test", "hidden": ["items.tags=0.5"], "candidates": "all", "rows": rows}
    lines = shown(modalities_table(result))
    assert " ".join(lines[0]) == (
        "test split, without items.tags=0.5 in every row: 1,200 users, 80 candidates each (all items); "
        "differences are to the first row"
    )
    heading = ["modalities", "left", "with", "none"]
    assert lines[2] == [*heading, *(word for name in ("ndcg", "recall", "map") for word in (f"{name}@10", "differs"))]
    assert lines[3] == ["all", "3", "users,", "1,500", "items", *["0.5000"] * 3]
    assert lines[4] == ["without", "users.club", "3", "users", *["0.2500", "-0.2500"] * 3]
    assert lines[5] == ["only", "items.cover", "1,500", "items", *["0.7500", "+0.2500"] * 3]
    assert lines[7] == [*heading, "mrr@10", "differs", "f1@10", "differs"]
    assert len(lines) == 11


def pair(entities: int, metrics: dict[str, float], distance: float | None) -> dict[str, Any]:
    ways = [{"metrics": {name: value / half for name, value in metrics.items()}} for half in (1, 2)]
    shape = {"side": "items", "modalities": ["tags", "cover"], "compared": min(entities, 40)}
    return {**shape, "entities": entities, "distance": distance, "retrieval": ways}


def test_gaps_with_what_chance_would_find() -> None:
    pairs = [
        pair(40, {"recall@5": 0.25, "recall@20": 0.75}, 0.5),
        pair(4000, {"recall@5/sampled-40": 0.5, "recall@10/sampled-40": 0.5}, 1.0),
        pair(0, {}, None),
    ]
    note, heading, *lines = shown(gap_table({"hidden": ["items.tags=0.5"], "pairs": pairs}))
    assert note[:2] == ["without", "items.tags=0.5;"]
    assert heading == "side a b with both distance recall a to b b to a by chance".split()
    assert lines == [
        ["items", "tags", "cover", "40", "0.5000", "@20", "0.7500", "0.3750", "0.5000"],
        ["items", "tags", "cover", "4,000", "1.0000", "@10/sampled-40", "0.5000", "0.2500", "0.2500"],
        ["items", "tags", "cover", "0", *["-"] * 5],
    ]
