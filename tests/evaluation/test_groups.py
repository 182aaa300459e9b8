"""Groups of users, and averages in each, against tables worked out by hand and sums in plain Python."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.manifest import FeatureSpec
from sibra_dist.evaluation.groups import (
    GroupAverages,
    Grouping,
    _by_activity,
    _by_history,
    category_labels,
    user_groupings,
)
from tests.planted import write_planted


def labelled(grouping: Grouping) -> list[str | None]:
    """The label of every user's group."""
    groups = grouping.groups(torch.arange(len(grouping.present))).tolist()
    return [grouping.labels[group] if group >= 0 else None for group in groups]


def test_users_are_grouped_by_category_activity_and_history(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset", protocol="cold_user"))
    club, activity, cold_start = user_groupings(dataset)
    assert (club.name, activity.name, cold_start.name) == ("users.club", "activity", "cold_start")
    assert labelled(club) == [f"group {user % 4}" if user % 7 else None for user in range(60)]
    warm = [split == 0 for split in dataset.users.split.tolist()]
    assert labelled(cold_start) == ["warm" if known else "cold" for known in warm]
    assert labelled(activity) == ["12" if known else None for known in warm]


def test_deciles_of_many_are_equally_large() -> None:
    lengths = torch.tensor([0, 0, *range(1, 101)])
    grouping = _by_activity(lengths)
    assert grouping.labels == tuple(f"{10 * decile + 1} to {10 * decile + 10}" for decile in range(10))
    assert labelled(grouping) == [None, None, *(label for label in grouping.labels for _ in range(10))]


def test_users_that_are_equally_active_are_in_one_group() -> None:
    """Of 12 users, the d-th decile ends with place ceil(1.2 d): 2, 3, 4, 5, 6, 8, 9, 10, 11, 12."""
    lengths = torch.tensor([5, 1, 1, 1, 1, 0, 1, 9, 2, 7, 3, 1, 3])
    grouping = _by_activity(lengths)
    # In order: 1 1 1 1 1 1 2 3 3 5 7 9, so the deciles end with 1 1 1 1 1 3 3 5 7 9.
    assert grouping.labels == ("1", "2 to 3", "4 to 5", "6 to 7", "8 to 9")
    one, few = "1", "2 to 3"
    assert labelled(grouping) == ["4 to 5", one, one, one, one, None, one, "8 to 9", few, "6 to 7", few, one, few]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_every_active_user_is_in_a_group_that_says_its_number(lengths: list[int]) -> None:
    for length, label in zip(lengths, labelled(_by_activity(torch.tensor(lengths))), strict=True):
        if length == 0:
            assert label is None
        else:
            assert label is not None
            bounds = [int(bound) for bound in label.split(" to ")]
            assert bounds[0] <= length <= bounds[-1]


def test_a_dataset_without_training_has_no_activity() -> None:
    lengths = torch.zeros(3, dtype=torch.int64)
    assert _by_activity(lengths).labels == ()
    assert labelled(_by_activity(lengths)) == [None] * 3
    assert labelled(_by_history(lengths)) == ["cold"] * 3


@pytest.mark.parametrize(
    ("vocabulary", "labels"),
    [
        (("a", "b"), ("a", "b")),
        ((None, "b"), ("(other)", "b")),
        ((None, "(other)", "((other))"), ("(((other)))", "(other)", "((other))")),
        (None, ("0", "1")),
    ],
)
def test_labels_of_a_category(vocabulary: tuple[str | None, ...] | None, labels: tuple[str, ...]) -> None:
    spec = FeatureSpec(name="city", kind="category", size=2, vocabulary=vocabulary, missing=0)
    assert category_labels(spec) == labels


def grouped(groups: Sequence[int], labels: Sequence[str]) -> Grouping:
    values = torch.tensor(groups, dtype=torch.int32)
    return Grouping("by", tuple(labels), values.clamp(min=0), values >= 0)


def test_averages_and_gap_by_hand() -> None:
    averages = GroupAverages([grouped([0, 1, 0, 3, -1], "abcd")], ["ndcg@1", "mrr@1"])
    values = torch.tensor([[1.0, 0.5], [0.25, 0.0], [0.5, 0.0], [0.5, 1.0], [1.0, 1.0]], dtype=torch.float64)
    averages.update(torch.arange(5), values)
    assert averages.compute(lambda found: {f"test/{name}": value for name, value in found.items()}) == {
        "by": {
            "groups": {
                "a": {"users": 2, "metrics": {"test/ndcg@1": 0.75, "test/mrr@1": 0.25}},
                "b": {"users": 1, "metrics": {"test/ndcg@1": 0.25, "test/mrr@1": 0.0}},
                "d": {"users": 1, "metrics": {"test/ndcg@1": 0.5, "test/mrr@1": 1.0}},
            },
            "gap": {"test/ndcg@1": 0.5, "test/mrr@1": 1.0},
            "users_in_none": 1,
        }
    }


def test_groups_without_users_or_metrics() -> None:
    assert GroupAverages([grouped([], "ab")], ["ndcg@1"]).compute() == {"by": {"groups": {}, "gap": {}, "users_in_none": 0}}
    nothing = GroupAverages([grouped([0], "a")], [])
    nothing.update(torch.tensor([0]), torch.empty(1, 0, dtype=torch.float64))
    assert nothing.compute() == {"by": {"groups": {"a": {"users": 1, "metrics": {}}}, "gap": {}, "users_in_none": 0}}


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.floats(0, 1) | st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=30),
    st.integers(1, 30),
)
def test_averages_are_those_of_exact_sums_in_any_tiling(users: list[tuple[int, float]], tile: int) -> None:
    grouping = grouped([group for group, _ in users], "abc")
    averages = GroupAverages([grouping], ["ndcg@1"])
    values = torch.tensor([[value] for _, value in users], dtype=torch.float64)
    for places in torch.randperm(len(users), generator=torch.Generator().manual_seed(tile)).split(tile):
        averages.update(places, values[places])
    groups = averages.compute()["by"]["groups"]
    for number, label in enumerate("abc"):
        own = [Fraction(round(value * 2**36), 2**36) for group, value in users if group == number]
        assert (label in groups) == bool(own)
        if own:
            assert groups[label] == {"users": len(own), "metrics": {"ndcg@1": float(sum(own) / len(own))}}
