"""Groups of users, and the averages of metrics in each: by what users are, and by how much is known of them.

A grouping gives every user one of a few groups, or none. All of them work alike: the value of a category feature, the
decile of activity, and whether there is any training interaction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sibra_dist.data.dataset import Dataset, Feature
from sibra_dist.data.manifest import FeatureSpec
from sibra_dist.evaluation.metrics import VALUE_BITS

ACTIVITY = "activity"
COLD_START = "cold_start"
DECILES = 10


@dataclass(frozen=True)
class Grouping:
    """A way to divide the users of a dataset into groups."""

    name: str
    labels: tuple[str, ...]
    """What each group is called; no two alike."""
    values: Tensor
    """integers [users]: the group of each user, a place in `labels`"""
    present: Tensor
    """bool [users]: who belongs to a group"""

    def groups(self, users: Tensor) -> Tensor:
        """The group of each of `users` (int64 [n]): int64 [n], -1 for one that belongs to none."""
        return self.values[users].long().masked_fill_(~self.present[users], -1)


def user_groupings(dataset: Dataset) -> list[Grouping]:
    """By every category feature of users, in their order, and named `users.NAME`; then `activity` and `cold_start`."""
    lengths = dataset.users.histories.lengths()
    categories = [feature for feature in dataset.users.features.values() if feature.spec.kind == "category"]
    return [*map(_by_category, categories), _by_activity(lengths), _by_history(lengths)]


def _by_category(feature: Feature) -> Grouping:
    assert isinstance(feature.values, Tensor)
    return Grouping(f"users.{feature.spec.name}", category_labels(feature.spec), feature.values, feature.present)


def category_labels(spec: FeatureSpec) -> tuple[str, ...]:
    """The text of each code of a category feature; of one that stands for all other values, `(other)`."""
    words = spec.vocabulary if spec.vocabulary is not None else tuple(map(str, range(spec.size)))
    other = "(other)"
    while other in words:
        other = f"({other})"
    return tuple(other if word is None else word for word in words)


def _by_activity(lengths: Tensor) -> Grouping:
    """Deciles of the dataset's users that have training interactions, by how many; equally many are in the same group.

    The d-th ends with the number that the user in place ceil(d n / 10) of n has, fewest first. Where that is the number
    with which the one before ends, the two are one group.
    """
    counts = lengths[lengths > 0].sort().values
    places = [-(-len(counts) * decile // DECILES) - 1 for decile in range(1, DECILES + 1)] if len(counts) else []
    ends = counts[places].unique()
    starts = [int(counts[0]), *(end + 1 for end in ends[:-1].tolist())] if len(counts) else []
    pairs = zip(starts, ends.tolist(), strict=True)
    labels = tuple(str(end) if start == end else f"{start} to {end}" for start, end in pairs)
    return Grouping(ACTIVITY, labels, torch.searchsorted(ends, lengths).to(torch.int8), lengths > 0)


def _by_history(lengths: Tensor) -> Grouping:
    """Whether a user has any training interaction."""
    return Grouping(COLD_START, ("cold", "warm"), lengths > 0, torch.ones_like(lengths, dtype=torch.bool))


class GroupAverages:
    """Averages of metrics over the users of each group, and the gap between the best and the worst.

    Values are rounded to multiples of 2**-36 and summed as integers, as those of all users are in
    `sibra_dist.evaluation.tallies`, so the order in which users come does not matter.
    """

    def __init__(self, groupings: Sequence[Grouping], metrics: Sequence[str]) -> None:
        self.groupings = tuple(groupings)
        self.metrics = tuple(metrics)
        # Python's integers, which never overflow, in an array.
        self._totals = [np.zeros((len(grouping.labels), len(metrics)), dtype=object) for grouping in groupings]
        self._users = [np.zeros(len(grouping.labels), dtype=np.int64) for grouping in groupings]
        self._without = [0 for _ in groupings]

    def update(self, users: Tensor, values: Tensor) -> None:
        """Add users (int64 [U]) with the value of each metric, float64 [U, M]; each user once, fewer than 2**26 at a time."""
        # Apart, so that sums of values that are large, such as counts, fit too.
        wholes = values.floor()
        parts = torch.stack([wholes.long(), ((values - wholes) * (1 << VALUE_BITS)).round().long()], dim=1)
        for number, grouping in enumerate(self.groupings):
            groups = grouping.groups(users)
            member = groups >= 0
            sums = parts.new_zeros(len(grouping.labels), *parts.shape[1:]).index_add_(0, groups[member], parts[member])
            whole, rest = (part.numpy().astype(object) for part in sums.unbind(1))
            self._totals[number] += (whole << VALUE_BITS) + rest
            self._users[number] += groups[member].bincount(minlength=len(grouping.labels)).numpy()
            self._without[number] += int((~member).sum())

    def compute(self, named: Callable[[dict[str, float]], dict[str, float]] = dict) -> dict[str, dict[str, Any]]:
        """By grouping: `groups`, by label, with `users` and `metrics`; `gap` by metric; `users_in_none` of them.

        Groups without users are left out. The gap is the highest of the groups' averages minus the lowest: 0 where there is
        but one, none where there is no group. `named` gives values by metric the names they are to have.
        """
        found: dict[str, dict[str, Any]] = {}
        for grouping, totals, users, without in zip(self.groupings, self._totals, self._users, self._without, strict=True):
            groups: dict[str, dict[str, Any]] = {}
            for label, row, count in zip(grouping.labels, totals.tolist(), users.tolist(), strict=True):
                if count:
                    averages = [total / (count << VALUE_BITS) for total in row]
                    groups[label] = {"users": count, "metrics": named(dict(zip(self.metrics, averages, strict=True)))}
            averages_of = [group["metrics"] for group in groups.values()]
            gap = {
                metric: max(column[metric] for column in averages_of) - min(column[metric] for column in averages_of)
                for metric in (averages_of[0] if averages_of else ())
            }
            found[grouping.name] = {"groups": groups, "gap": gap, "users_in_none": without}
        return found
