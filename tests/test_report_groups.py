"""What a person reads of groups of users."""

import io
from typing import Any

from rich.console import Console

from sibra_dist.report_groups import groups_table


def shown(result: dict[str, Any]) -> list[list[str]]:
    """The words of each line as they are printed."""
    file = io.StringIO()
    Console(file=file, width=120, highlight=False, markup=False, emoji=False).print(groups_table(result), soft_wrap=True)
    return [line.split() for line in file.getvalue().splitlines()]


def grouping(metrics: dict[str, tuple[float, float]], users_in_none: int = 0) -> dict[str, Any]:
    """Groups `[a]`, of 1200 users, and `b b`, of 3."""
    groups = {
        label: {"users": users, "metrics": {f"test/{name}": values[number] for name, values in metrics.items()}}
        for number, (label, users) in enumerate((("[a]", 1200), ("b b", 3)))
    }
    gap = {f"test/{name}": abs(first - second) for name, (first, second) in metrics.items()}
    return {"groups": groups, "gap": gap, "users_in_none": users_in_none}


def test_groups_at_cutoff_10_with_their_gap() -> None:
    metrics = {"ndcg@5": (0.9, 0.9), "ndcg@10": (0.5, 0.25), "auc": (0.75, 0.5), "mrr@20": (0.9, 0.9)}
    assert shown({"groups": {"users.city": grouping(metrics, users_in_none=1000)}}) == [
        [],
        ["users", "by", "city", "users", "ndcg@10", "auc"],
        ["[a]", "1,200", "0.5000", "0.7500"],
        ["b", "b", "3", "0.2500", "0.5000"],
        ["in", "none", "1,000"],
        ["gap", "0.2500", "0.2500"],
    ]


def test_the_greatest_cutoff_where_there_is_none_of_10() -> None:
    lines = shown({"groups": {"activity": grouping({"ndcg@5": (0.5, 0.25), "ndcg@50": (0.75, 0.5)})}})
    assert lines[1] == ["users", "by", "activity", "users", "ndcg@50"]


def test_many_metrics_take_several_tables() -> None:
    metrics = {f"metric_{number}@10": (1.0, number / 16) for number in range(16)}
    lines = shown({"groups": {"cold_start": grouping(metrics)}})
    heads = [line[4:] for line in lines if line[1:2] == ["by"]]
    assert [name for head in heads for name in head] == list(metrics)
    assert [len(head) for head in heads] == [6, 6, 4]


def test_one_group_has_no_gap_and_no_metrics_leave_the_users() -> None:
    alone = {"groups": {"warm": {"users": 5, "metrics": {}}}, "gap": {}, "users_in_none": 0}
    assert shown({"groups": {"cold_start": alone}}) == [[], ["users", "by", "cold_start", "users"], ["warm", "5"]]


def test_items_with_how_many_of_them_are_relevant() -> None:
    head = {"candidates": 1000, "relevant": 50, "metrics": {"recall@5": 0.25, "recall@20": 0.5}}
    tail = {"candidates": 30, "relevant": 0, "metrics": {}}
    found = {"groups": {"head": head, "long tail": tail}, "gap": {"recall@5": 0.0, "recall@20": 0.0}}
    assert shown({"item_groups": {"popularity": found}}) == [
        [],
        ["items", "by", "popularity", "candidates", "relevant", "recall@20"],
        ["head", "1,000", "50", "0.5000"],
        ["long", "tail", "30", "0", "-"],
        ["gap", "0.0000"],
    ]


def test_a_result_of_an_earlier_version_has_no_groups() -> None:
    assert shown({}) == []
