"""Metrics of one user's list, each against a value worked out by hand and against another implementation."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional import retrieval

from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import Comparisons
from sibra_dist.evaluation.metrics import CATALOG_METRICS, FEATURE_METRICS, USER_METRICS
from sibra_dist.evaluation.user_metrics import Lists

# Relevance of all candidates of one user in ranked order, at least one relevant.
ranked_relevance = st.lists(st.booleans(), min_size=1, max_size=12).filter(any)
cutoffs = st.integers(1, 15)
SHARES = ("ndcg", "recall", "precision", "map", "hit_rate", "mrr", "f1")
"""The metrics of accuracy at a cutoff."""


def value(name: str, relevance: list[bool], k: int) -> float:
    """The metric of one user: its list is cut or filled up to k, as ranking does."""
    hits = torch.tensor([(relevance + [False] * k)[:k]])
    found = USER_METRICS[name](Lists(hits, torch.tensor([sum(relevance)])), k)
    assert found.dtype == torch.float64
    assert found.shape == (1,)
    return float(found)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("ndcg", retrieval.retrieval_normalized_dcg),
        ("recall", retrieval.retrieval_recall),
        ("precision", retrieval.retrieval_precision),
        ("hit_rate", retrieval.retrieval_hit_rate),
        ("mrr", retrieval.retrieval_reciprocal_rank),
    ],
)
@given(relevance=ranked_relevance, k=cutoffs)
def test_metric_agrees_with_torchmetrics(name: str, oracle: Callable[..., Tensor], relevance: list[bool], k: int) -> None:
    scores = torch.arange(len(relevance), 0, -1).float()
    expected = float(oracle(scores, torch.tensor(relevance), top_k=k))
    assert value(name, relevance, k) == pytest.approx(expected, abs=1e-6)


@given(relevance=ranked_relevance, k=cutoffs)
def test_map_is_torchmetrics_over_what_could_be_hit_rather_than_what_was(relevance: list[bool], k: int) -> None:
    scores = torch.arange(len(relevance), 0, -1).float()
    over_hits = float(retrieval.retrieval_average_precision(scores, torch.tensor(relevance), top_k=k))
    expected = over_hits * sum(relevance[:k]) / min(k, sum(relevance))
    assert value("map", relevance, k) == pytest.approx(expected, abs=1e-6)


@given(relevance=ranked_relevance, k=cutoffs)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(relevance: list[bool], k: int) -> None:
    precision, recall = sum(relevance[:k]) / k, sum(relevance[:k]) / sum(relevance)
    expected = 2 * precision * recall / (precision + recall) if precision else 0.0
    assert value("f1", relevance, k) == pytest.approx(expected, rel=1e-12)


# Three relevant candidates, of which those at ranks 2 and 4 of the first five are found. Six candidates are ranked from the
# last to the first, so these are 4 and 2; the third, 0, is at rank 6. Ten users made 40 training interactions.
CATALOG = Catalog.of(torch.tensor([8, 7, 5, 10, 0, 2, 8]), torch.arange(6), num_users=10)
ITEMS = [5, 4, 3, 2, 1, 0]
PLACES = 1 + 1 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(5) + 1 / math.log2(6)
TABLE = {
    "ndcg": (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / math.log2(4)),
    "recall": 2 / 3,
    "precision": 2 / 5,
    "map": (1 / 2 + 2 / 4) / 3,
    "hit_rate": 1.0,
    "mrr": 1 / 2,
    "f1": 4 / 8,
    "auc": (2 + 1 + 0) / 9,  # irrelevant ones at ranks 1, 3 and 5: two, one and none below ranks 2, 4 and 6
    "aplt": 4 / 5,  # candidate 3 alone holds a fourth of the interactions
    "aclt": 4.0,
    "epc": (1.0 / math.log2(3) + 0.5 / math.log2(5)) / PLACES,
    "efd": (math.log2(40 / 2) / math.log2(3) + math.log2(40 / 5) / math.log2(5)) / PLACES,  # candidate 4 as candidate 5
}


@pytest.mark.parametrize("name", USER_METRICS)
def test_metric_of_a_list_worked_by_hand(name: str) -> None:
    hits = torch.tensor([[False, True, False, True, False, True]])  # a hit after the cutoff counts for nothing
    comparisons = Comparisons(torch.tensor([9]), torch.tensor([6]))
    found = USER_METRICS[name](Lists(hits, torch.tensor([3]), torch.tensor([ITEMS]), CATALOG, comparisons), 5)
    assert found.item() == pytest.approx(TABLE[name], abs=1e-11)


@pytest.mark.parametrize("name", SHARES)
@given(relevance=ranked_relevance, k=cutoffs)
def test_metric_is_a_share_and_never_falls_when_a_hit_moves_up(name: str, relevance: list[bool], k: int) -> None:
    before = value(name, relevance, k)
    assert 0 <= before <= 1
    for place in range(1, len(relevance)):
        if relevance[place] > relevance[place - 1]:
            better = [*relevance]
            better[place - 1], better[place] = True, False
            assert value(name, better, k) >= before


@pytest.mark.parametrize("name", SHARES)
def test_metric_of_a_perfect_list_is_one(name: str) -> None:
    assert value(name, [True] * 4 + [False] * 3, 4) == 1


@pytest.mark.parametrize("name", [*SHARES, "epc", "efd"])
@pytest.mark.parametrize("num_relevant", [0, 2])
def test_metric_without_hits_is_zero(name: str, num_relevant: int) -> None:
    lists = Lists(torch.zeros(1, 3, dtype=torch.bool), torch.tensor([num_relevant]), torch.tensor([[1, 0, -1]]), CATALOG)
    assert USER_METRICS[name](lists, 3).tolist() == [0]


@pytest.mark.parametrize("name", [name for name in USER_METRICS if name != "auc"])
@pytest.mark.parametrize("catalog", [CATALOG, Catalog.of(torch.zeros(0, dtype=torch.int64), torch.arange(0), 0)])
def test_metric_of_a_user_without_candidates_is_zero(name: str, catalog: Catalog) -> None:
    lists = Lists(torch.zeros(1, 3, dtype=torch.bool), torch.tensor([0]), torch.tensor([[-1, -1, -1]]), catalog)
    assert USER_METRICS[name](lists, 3).tolist() == [0]


def test_auc_of_no_pairs_is_chance_unless_nothing_is_relevant() -> None:
    comparisons = Comparisons(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 1]))
    hits = torch.zeros(3, 1, dtype=torch.bool)
    assert USER_METRICS["auc"](Lists(hits, torch.tensor([0, 2, 1]), comparisons=comparisons), 0).tolist() == [0, 0.5, 0.25]


@pytest.mark.parametrize("name", ["auc", "aplt", "aclt", "epc", "efd"])
def test_metric_says_what_it_lacks(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs (comparisons|items and catalog)"):
        USER_METRICS[name](Lists(torch.zeros(1, 3, dtype=torch.bool), torch.tensor([1])), 3)


@pytest.mark.parametrize("function", [*USER_METRICS.values(), *FEATURE_METRICS.values(), *CATALOG_METRICS.values()])
def test_metric_says_its_direction_and_its_empty_case(function: Callable[..., object]) -> None:
    text = " ".join((function.__doc__ or "").lower().split())
    assert "higher is" in text or "lower is" in text
    assert re.search("[;.] 0 (for|where|without) ", text)
