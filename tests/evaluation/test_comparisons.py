"""What the area under the ROC curve counts, against looking at all pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.data.transfer import to_device
from sibra_dist.evaluation.comparisons import rank_and_compare
from sibra_dist.evaluation.ranking import rank

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INF = math.inf


def csr(rows: list[set[int]]) -> Csr:
    lengths = torch.tensor([0, *map(len, rows)])
    return Csr(lengths.cumsum(0), torch.tensor([item for row in rows for item in sorted(row)], dtype=torch.int32))


@st.composite
def ranked(draw: st.DrawFn) -> tuple[list[list[float]], list[set[int]]]:
    """Scores with many ties, and what is relevant to each user; a score of minus infinity is masked."""
    width = draw(st.integers(0, 12))
    score = st.sampled_from([-INF, -1.5, -0.0, 0.0, 1e-30, 2.0, INF])
    scores = draw(st.lists(st.lists(score, min_size=width, max_size=width), min_size=1, max_size=5))
    relevant = st.sets(st.integers(0, width - 1)) if width else st.just(set[int]())
    return scores, [draw(relevant) for _ in scores]


def by_pairs(scores: list[float], relevant: set[int]) -> tuple[int, float]:
    """How many pairs there are, and how many are won."""
    irrelevant = [score for item, score in enumerate(scores) if item not in relevant and score != -INF]
    pairs = [(scores[item], other) for item in relevant for other in irrelevant]
    return len(pairs), sum((own > other) + 0.5 * (own == other) for own, other in pairs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile_size", [1, 5, 10**9])
@given(given=ranked(), k=st.integers(1, 14))
def test_all_pairs_are_counted_and_the_ranking_is_the_same(
    device: str, tile_size: int, given: tuple[list[list[float]], list[set[int]]], k: int
) -> None:
    scores, relevant = given
    matrix = torch.tensor(scores, device=device).view(len(scores), -1)
    rows = to_device(csr(relevant), torch.device(device))
    found, comparisons = rank_and_compare(lambda start, stop: matrix[:, start:stop], rows, matrix.shape[1], k, tile_size)
    expected = rank(lambda start, stop: matrix[:, start:stop], matrix.shape[1], k, 10**9)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    counts, twice_won = comparisons.num_pairs.tolist(), comparisons.twice_won.tolist()
    assert [(pairs, twice / 2) for pairs, twice in zip(counts, twice_won, strict=True)] == [*map(by_pairs, scores, relevant)]


def test_pairs_of_a_table_worked_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0], [-INF, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    rows = csr([{1, 2}, {3}, set()])
    _, comparisons = rank_and_compare(lambda start, stop: scores[:, start:stop], rows, 4, 2, 3)
    # Candidate 1 ties with 3, candidate 2 beats it, and neither beats 0; then two ties; then nothing to compare.
    assert comparisons.num_pairs.tolist() == [4, 2, 0]
    assert comparisons.twice_won.tolist() == [3, 2, 0]


@pytest.mark.parametrize(("tile_size", "expected"), [(10, [(0, 10)]), (4, [(0, 4), (4, 8), (8, 10), (0, 4), (4, 8), (8, 10)])])
def test_one_tile_is_scored_once_and_several_twice(tile_size: int, expected: list[tuple[int, int]]) -> None:
    asked = []

    def score_tile(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.zeros(2, stop - start)

    rank_and_compare(score_tile, csr([{1}, {9}]), 10, k=3, tile_size=tile_size)
    assert asked == expected


def test_scores_of_half_precision_are_compared_as_they_are_ranked() -> None:
    scores = torch.tensor([[1.0, 1.0 + 2**-12, 2.0]]).bfloat16()  # the second is rounded to 1
    _, comparisons = rank_and_compare(lambda start, stop: scores[:, start:stop], csr([{1}]), 3, 2, 2)
    assert comparisons.twice_won.tolist() == [1]
