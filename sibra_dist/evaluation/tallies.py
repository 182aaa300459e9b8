"""Metrics of all users: what `sibra_dist.evaluation.metrics` names, averaged or counted over the users of all ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sibra_dist.errors import SibraError
from sibra_dist.evaluation.catalog import Catalog, of_listed
from sibra_dist.evaluation.catalog_metrics import Shown
from sibra_dist.evaluation.metrics import CATALOG_METRICS, MAX_USERS, VALUE_BITS, of_users, parse_metric
from sibra_dist.evaluation.sums import Sums
from sibra_dist.evaluation.user_metrics import Lists


class UserAverages(Sums):
    """Averages of `metrics` (`name@k`) over the users of all ranks that have something relevant; the others are counted.

    Every user is given to one rank, once.
    """

    wholes: Tensor
    fractions: Tensor
    num_users: Tensor
    num_users_without_relevant: Tensor

    def __init__(self, metrics: Sequence[str]) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self._parsed = [(measure, k) for name, k in map(parse_metric, metrics) if (measure := of_users(name)) is not None]
        for name in ("wholes", "fractions"):
            self.add_state(name, torch.zeros(len(self.metrics), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_users", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_users_without_relevant", torch.tensor(0), dist_reduce_fx="sum")

    def per_user(self, lists: Lists) -> Tensor:
        """Every metric of every user, float64 [U, M] in the order of `metrics`; NaN for a user with nothing relevant.

        Lists are to be as long as the largest cutoff at least.
        """
        values = lists.hits.new_empty((len(lists.hits), len(self._parsed)), dtype=torch.float64)
        for column, (measure, k) in enumerate(self._parsed):
            if lists.hits.shape[1] < k:
                raise ValueError(f"{self.metrics[column]} of lists of {lists.hits.shape[1]}")
            values[:, column] = measure(lists, k)
        return values.masked_fill_((lists.num_relevant == 0)[:, None], torch.nan)

    def update(self, values: Tensor, num_relevant: Tensor) -> None:
        """Add users: what `per_user` gives, float64 [U, M], and how many candidates are relevant to each, int64 [U]."""
        without_relevant = num_relevant == 0
        values = values.masked_fill(without_relevant[:, None], 0.0)
        wholes = values.floor()
        self.wholes += wholes.long().sum(dim=0)
        self.fractions += ((values - wholes) * (1 << VALUE_BITS)).round().long().sum(dim=0)
        self.num_users += (~without_relevant).sum()
        self.num_users_without_relevant += without_relevant.sum()

    def compute(self) -> dict[str, float]:
        """The averages by metric, then `num_users` averaged and `num_users_without_relevant`.

        An average over no user is NaN. Raises:
            SibraError: there are more users than the sums can hold.
        """
        num_users = int(self.num_users)
        if num_users > MAX_USERS:
            raise SibraError(f"{num_users} users cannot be averaged over, only {MAX_USERS}; evaluate a sample of them")
        # Python's integers do not overflow, and their division rounds once, where a float64 could already be rounded.
        divisor = num_users << VALUE_BITS
        pairs = zip(self.wholes.tolist(), self.fractions.tolist(), strict=True)
        totals = [(whole << VALUE_BITS) + fraction for whole, fraction in pairs]
        averages = [total / divisor if divisor else math.nan for total in totals]
        return {
            **dict(zip(self.metrics, averages, strict=True)),
            "num_users": float(num_users),
            "num_users_without_relevant": float(self.num_users_without_relevant),
        }


class CatalogTallies(Sums):
    """Catalogue `metrics` (`name@k`) of what the users of all ranks are recommended.

    The catalogue of the candidates stays on the device where it is, and that is where the metric is to be.
    """

    exposure: Tensor
    full: Tensor
    hits: Tensor
    relevant: Tensor
    candidates: Tensor
    num_users: Tensor

    def __init__(self, metrics: Sequence[str], catalog: Catalog) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self._catalog = catalog
        self._parsed = [parse_metric(metric) for metric in metrics]
        self._cutoffs = sorted({k for _, k in self._parsed})
        shapes = {"exposure": (len(self._cutoffs), len(catalog.popularity)), "full": (len(self._cutoffs),)}
        shapes |= {"hits": (len(self._cutoffs), 2), "relevant": (2,), "candidates": (2,), "num_users": ()}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, items: Tensor, hits: Tensor, relevant: Tensor, masked: Tensor) -> None:
        """Count recommendations of U users.

        Args:
            items: int64 [U, K], candidates best first, K at least the largest cutoff; -1 is no candidate.
            hits: bool [U, K], which of them are relevant.
            relevant: candidates of the pairs of a user and a relevant candidate, [P].
            masked: candidates of the pairs of a user and what is masked, each pair once, [Q]; -1 is no candidate.
        """
        in_tail = of_listed(self._catalog.long_tail, items)
        for number, k in enumerate(self._cutoffs):
            if items.shape[1] < k:
                raise ValueError(f"a cutoff of {k} of lists of {items.shape[1]}")
            shown = items[:, :k]
            self.exposure[number] += torch.bincount(shown[shown >= 0], minlength=len(self._catalog.popularity))
            self.full[number] += (shown >= 0).all(dim=1).sum()
            self.hits[number] += _by_group(in_tail[:, :k], hits[:, :k])
        long_tail = self._catalog.long_tail
        self.relevant += _by_group(of_listed(long_tail, relevant), relevant >= 0)
        self.candidates += len(items) * _by_group(long_tail, torch.ones_like(long_tail))
        self.candidates -= _by_group(of_listed(long_tail, masked), masked >= 0)
        self.num_users += len(items)

    def compute(self) -> dict[str, float]:
        """The value of each metric; each function says what it is where nothing is recommended."""
        found = {}
        for name, k in self._parsed:
            number = self._cutoffs.index(k)
            shown = Shown(
                exposure=self.exposure[number],
                catalog=self._catalog,
                num_users=int(self.num_users),
                num_full=int(self.full[number]),
                hits=_pair(self.hits[number]),
                relevant=_pair(self.relevant),
                candidates=_pair(self.candidates),
            )
            found[f"{name}@{k}"] = CATALOG_METRICS[name](shown)
        return found


def _by_group(in_tail: Tensor, counted: Tensor) -> Tensor:
    """How many of those counted are in the head, and how many in the long tail: int64 [2] of bool of any shape."""
    return torch.stack([(counted & ~in_tail).sum(), (counted & in_tail).sum()])


def _pair(groups: Tensor) -> tuple[int, int]:
    head, tail = groups.tolist()
    return head, tail
