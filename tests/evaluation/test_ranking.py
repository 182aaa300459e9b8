import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.data.transfer import to_device
from sibra_dist.errors import SibraError
from sibra_dist.evaluation.ranking import Recommendations, hits, mask_, merge, rank, top_k

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INF = math.inf

# Few distinct values, so that ties at the last place are the rule; -0.0 and 0.0 are equal scores with different bits.
tied_scores = st.integers(1, 30).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0, INF]), min_size=width, max_size=width),
        min_size=1,
        max_size=6,
    )
)


def sorted_in_python(scores: list[list[float]], k: int) -> Recommendations:
    """The definition: by score, then by position; masked candidates never."""
    items, values = [], []
    for row in scores:
        best = sorted((-score, item) for item, score in enumerate(row) if score != -INF)[:k]
        items.append([item for _, item in best] + [-1] * (k - len(best)))
        values.append([-negated for negated, _ in best] + [-INF] * (k - len(best)))
    return Recommendations(torch.tensor(items), torch.tensor(values))


def assert_equal(found: Recommendations, expected: Recommendations) -> None:
    assert found.items.dtype == torch.int64
    assert found.scores.dtype == torch.float32
    assert found.items.tolist() == expected.items.tolist()
    assert found.scores.tolist() == expected.scores.tolist()


def csr(rows: list[list[int]]) -> Csr:
    lengths = torch.tensor([0, *map(len, rows)])
    return Csr(lengths.cumsum(0), torch.tensor([item for row in rows for item in row], dtype=torch.int32))


@pytest.mark.parametrize("device", DEVICES)
@given(scores=tied_scores, k=st.integers(1, 35))
def test_top_k_is_sorted_by_score_and_then_by_candidate(device: str, scores: list[list[float]], k: int) -> None:
    assert_equal(top_k(torch.tensor(scores, device=device), k), sorted_in_python(scores, k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile_size", [1, 7, 64, 10**9])
@given(scores=tied_scores, k=st.integers(1, 35))
def test_any_tiling_gives_the_same_lists(device: str, tile_size: int, scores: list[list[float]], k: int) -> None:
    matrix = torch.tensor(scores, device=device)
    tiled = rank(lambda start, stop: matrix[:, start:stop], matrix.shape[1], k, tile_size)
    assert_equal(tiled, sorted_in_python(scores, k))


@pytest.mark.parametrize("device", DEVICES)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 700),
    distinct=st.sampled_from([1, 3, 50, 10**6]),
    masked=st.sampled_from([0.0, 0.5, 0.99]),
    k=st.integers(1, 9),
)
def test_long_rows_that_are_looked_at_in_groups_give_the_same(
    device: str, seed: int, width: int, distinct: int, masked: float, k: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-distinct, distinct, (4, width), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < masked] = -INF
    assert_equal(top_k(scores.to(device), k), sorted_in_python(scores.tolist(), k))


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_row_of_equal_scores_gives_its_first_candidates(device: str) -> None:
    # Long enough for the algorithms that libraries keep for large inputs.
    scores = torch.zeros(3, 20_000, device=device)
    scores[1, 15_000:15_005] = 1.0
    found = top_k(scores, 10).items.tolist()
    assert found == [[*range(10)], [*range(15_000, 15_005), *range(5)], [*range(10)]]


def test_rank_asks_for_each_tile_once_and_never_for_more() -> None:
    asked = []

    def score_tile(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.zeros(2, stop - start)

    rank(score_tile, num_candidates=10, k=3, tile_size=4)
    assert asked == [(0, 4), (4, 8), (8, 10)]


def test_no_candidates_recommend_nothing() -> None:
    expected = Recommendations(torch.full((2, 3), -1), torch.full((2, 3), -INF))
    assert_equal(rank(lambda start, stop: torch.zeros(2, stop - start), 0, 3, 8), expected)


def test_no_users_have_no_lists() -> None:
    assert top_k(torch.zeros(0, 5), 3).items.shape == (0, 3)


def test_half_precision_scores_are_ranked_as_they_are() -> None:
    scores = torch.tensor([[1.0, 1.0 + 2**-12, 2.0]]).bfloat16()  # the second is rounded to 1
    assert_equal(top_k(scores, 2), Recommendations(torch.tensor([[2, 0]]), torch.tensor([[2.0, 1.0]])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 2, 9])
def test_a_score_that_is_not_a_number_names_its_user_and_candidate(device: str, k: int) -> None:
    scores = torch.zeros(4, 9, device=device)
    scores[2, 7] = torch.nan
    scores[3, 0] = INF
    with pytest.raises(SibraError, match="candidate 7 for the user in row 2"):
        rank(lambda start, stop: scores[:, start:stop], 9, k, tile_size=5)


def test_merge_prefers_the_lower_range_among_equal_scores() -> None:
    left = Recommendations(torch.tensor([[3, 1]]), torch.tensor([[2.0, 1.0]]))
    right = Recommendations(torch.tensor([[8, 5]]), torch.tensor([[2.0, 1.0]]))
    assert_equal(merge(left, right, 2), Recommendations(torch.tensor([[3, 8]]), torch.tensor([[2.0, 2.0]])))


@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 11)), max_size=30),
    start=st.integers(0, 9),
    width=st.integers(0, 5),
)
def test_mask_hides_the_pairs_of_its_tile_alone(pairs: list[tuple[int, int]], start: int, width: int) -> None:
    scores = torch.ones(4, width)
    rows, candidates = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    assert mask_(scores, rows, candidates, start) is scores
    expected = [[-INF if (row, start + column) in pairs else 1.0 for column in range(width)] for row in range(4)]
    assert scores.tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@given(
    relevant=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=5),
    data=st.data(),
)
def test_hits_are_the_recommended_candidates_in_the_users_own_row(
    device: str, relevant: list[set[int]], data: st.DataObject
) -> None:
    row = st.lists(st.integers(-1, 5), min_size=4, max_size=4)
    items = data.draw(st.lists(row, min_size=len(relevant), max_size=len(relevant)))
    found = hits(torch.tensor(items, device=device), to_device(csr([sorted(own) for own in relevant]), torch.device(device)), 6)
    assert found.tolist() == [[item in own for item in row] for row, own in zip(items, relevant, strict=True)]


def test_a_missing_candidate_is_no_hit_for_the_user_before() -> None:
    # -1 in row 1 and candidate 2 in row 0 are the same place in a matrix of three columns.
    assert hits(torch.tensor([[0], [-1]]), csr([[2], []]), 3).tolist() == [[False], [False]]
