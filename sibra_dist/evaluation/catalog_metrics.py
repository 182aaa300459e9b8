"""Metrics of what all users together are shown; see `sibra_dist.evaluation.metrics` for their names."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.evaluation.catalog import Catalog


class Shown(NamedTuple):
    """What is known of the first k places of everyone's list. Groups are the head and then the long tail of the catalogue."""

    exposure: Tensor
    """int64 [C]: how often each candidate is recommended"""
    catalog: Catalog
    num_users: int
    """users who were given a list"""
    num_full: int
    """of these, those with k candidates in it"""
    hits: tuple[int, int]
    """by group: how often something relevant is recommended"""
    relevant: tuple[int, int]
    """by group: pairs of a user and a relevant candidate"""
    candidates: tuple[int, int]
    """by group: pairs of a user and a candidate that is not masked"""


def coverage(shown: Shown) -> float:
    """Share of the candidates that are recommended to anyone. In [0, 1], higher is broader; 0 without candidates."""
    return int(shown.exposure.count_nonzero()) / max(len(shown.exposure), 1)


def user_coverage(shown: Shown) -> float:
    """Share of the users to whom k candidates are recommended, rather than fewer because no more are left.

    In [0, 1], higher is better; 0 without users. Gunawardana & Shani, Recommender Systems Handbook, 2015; Elliot counts
    these users (UserCoverageAtN, and at a cutoff of 1 UserCoverage), and does not divide by all.
    """
    return shown.num_full / max(shown.num_users, 1)


def gini(shown: Shown) -> float:
    """Inequality of exposure: sum of (2j - C - 1) p_j over C - 1, with p_j the j-th smallest of C shares of exposure.

    In [0, 1], lower is more even: 0 where all are recommended equally often, 1 where one candidate takes every place. 0 where
    nothing is recommended or there is but one candidate. Gunawardana & Shani, Recommender Systems Handbook, 2015, which
    Elliot documents too, while it reports 1 minus this.
    """
    exposure = shown.exposure
    num_candidates, total = len(exposure), int(exposure.sum())
    if num_candidates < 2 or total == 0:
        return 0.0
    # In integers, so exact; an int64 is enough for 2**27 users with lists of 100 from 5e8 candidates.
    places = torch.arange(1 - num_candidates, num_candidates, 2, device=exposure.device)
    return int((exposure.sort().values * places).sum()) / (total * (num_candidates - 1))


def entropy(shown: Shown) -> float:
    """Shannon entropy of the shares of exposure, in bits.

    In [0, log2 C], higher is more even; 0 where nothing is recommended. Gunawardana & Shani, Recommender Systems Handbook,
    2015.
    """
    # Equal exposures make equal terms, and there are few distinct ones: few enough for a sum that is exact in any order.
    counts, candidates = torch.unique(shown.exposure[shown.exposure > 0], return_counts=True)
    total = int(shown.exposure.sum())
    pairs = zip(counts.tolist(), candidates.tolist(), strict=True)
    return math.fsum(number * (count / total) * math.log2(total / count) for count, number in pairs)


def arp(shown: Shown) -> float:
    """Average recommendation popularity: the mean number of training interactions of what is recommended.

    From 0 on, lower is less biased towards what is popular; 0 where nothing is recommended, and where all candidates are
    cold. Yin et al., VLDB 2012; here over all recommendations, which is the mean over users where all have equally many.
    """
    return int((shown.exposure * shown.catalog.popularity).sum()) / max(int(shown.exposure.sum()), 1)


def pop_reo(shown: Shown) -> float:
    """Ranking-based equal opportunity of head and long tail: how much the share of the relevant that is recommended varies.

    Zhu, Wang & Caverlee, SIGIR 2020: the standard deviation of P(recommended | group, relevant) over the groups, over its mean;
    the groups by popularity are Elliot's. In [0, 1], lower is less biased; 0 where nothing relevant is recommended, and where
    one of the groups holds nothing relevant: then there is nothing to compare.
    """
    return _variation(shown.hits, shown.relevant)


def pop_rsp(shown: Shown) -> float:
    """Ranking-based statistical parity of head and long tail: how much the share of candidates that is recommended varies.

    Zhu, Wang & Caverlee, SIGIR 2020: the standard deviation of P(recommended | group) over the groups, over its mean, where the
    candidates are those that are not masked for the user; the groups by popularity are Elliot's. In [0, 1], lower is less
    biased; 0 where nothing is recommended, and where one of the groups holds no candidates: then there is nothing to compare.
    """
    exposed = int(shown.exposure.sum())
    in_tail = int(shown.exposure[shown.catalog.long_tail].sum())
    return _variation((exposed - in_tail, in_tail), shown.candidates)


def _variation(counts: tuple[int, int], totals: tuple[int, int]) -> float:
    """Standard deviation of two shares over their mean; 0 where both are 0, or one is of nothing."""
    # Of two, the deviation is half their difference, and the mean half their sum. As fractions, with one rounding.
    one, other = counts[0] * totals[1], counts[1] * totals[0]
    return abs(one - other) / (one + other) if one + other and all(totals) else 0.0
