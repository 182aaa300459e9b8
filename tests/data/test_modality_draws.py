"""Which modalities of an entity a step sees."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sibra_dist.data.batches import EMPTY, ModalitySampling, draw_modalities, stream

samplings = st.integers(1, 4).flatmap(
    lambda width: st.tuples(
        st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=8),
        st.none() | st.integers(1, 5),
        st.none() | st.integers(0, width - 1),
        st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=width, max_size=width).map(tuple),
    )
)


@given(sampling=samplings, key=st.integers(0, 2**60))
def test_drawn_modalities_are_present_and_distinct_and_come_before_empty_slots(
    sampling: tuple[list[list[bool]], int | None, int | None, tuple[float, ...] | None], key: int
) -> None:
    present, draws, first, dropout = sampling
    width = len(present[0])
    drawn = draw_modalities(
        ModalitySampling(torch.tensor(present), draws, first, dropout),
        torch.arange(len(present)),
        key,
        torch.arange(len(present)),
    )
    assert drawn.shape == (len(present), draws or width)
    for row, there in zip(drawn.tolist(), present, strict=True):
        never = {number for number in range(width) if not there[number] or (dropout and dropout[number] == 1)}
        always = {number for number in range(width) if there[number] and not (dropout and dropout[number])}
        used = [number for number in row if number != EMPTY]
        assert row == used + [EMPTY] * (len(row) - len(used))
        if used == [width]:  # "unknown"
            assert not always
            continue
        assert used
        assert len(set(used)) == len(used)
        assert not never & set(used)
        assert set(used) <= set(range(width))
        assert len(used) >= min(len(row), len(always))
        if first in always:
            assert used[0] == first
        if first in used:
            assert used[0] == first


def test_the_first_version_s_draws_are_repeated_but_for_what_it_drew_twice() -> None:
    present = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    entities = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    drawn = draw_modalities(ModalitySampling(present, 2), entities, stream(4, 2), torch.arange(8)).tolist()
    assert drawn[:6] == [[2, 3], [0, 2], [1, 2], [0, 1], [2, 0], [1, 2]]
    assert drawn[6:] == [[3, EMPTY], [4, EMPTY]]


@pytest.mark.parametrize("draws", [None, 1, 2])
def test_drawn_modalities_are_uniform(draws: int | None) -> None:
    """Over all ordered choices of those that are there: a chi-square test at one in a million."""
    sampling = ModalitySampling(torch.tensor([[True, False, True, True]]), draws)
    count = 12_000
    drawn = draw_modalities(sampling, torch.zeros(count, dtype=torch.int64), stream(9), torch.arange(count))
    choices = Counter(tuple(row) for row in drawn.tolist())
    assert len(choices) == {None: 6, 1: 3, 2: 6}[draws]
    assert chisquare(list(choices.values())).pvalue > 1e-6


def test_a_modality_drops_out_as_often_as_its_rate_says_and_apart_from_the_others() -> None:
    sampling = ModalitySampling(torch.ones(1, 2, dtype=torch.bool), None, None, (0.5, 0.1))
    count = 20_000
    drawn = draw_modalities(sampling, torch.zeros(count, dtype=torch.int64), stream(3), torch.arange(count))
    kept = Counter(tuple(sorted(number for number in row if number != EMPTY)) for row in drawn.tolist())
    expected = {(0, 1): 0.45, (0,): 0.05, (1,): 0.45, (2,): 0.05}
    assert kept.keys() == expected.keys()
    assert chisquare([kept[key] for key in expected], [share * count for share in expected.values()]).pvalue > 1e-6


def test_a_modality_that_is_left_is_drawn_as_likely_as_any_other_that_is() -> None:
    """Half of the time there are two to draw from: so one in four draws gives the modality that may drop out."""
    sampling = ModalitySampling(torch.ones(1, 2, dtype=torch.bool), 1, None, (0.5, 0.0))
    drawn = draw_modalities(sampling, torch.zeros(8000, dtype=torch.int64), stream(6), torch.arange(8000))
    assert chisquare(torch.bincount(drawn[:, 0], minlength=2).numpy(), [2000, 6000]).pvalue > 1e-6


def test_dropout_does_not_change_the_order_of_what_is_left() -> None:
    present, entities, counters = torch.ones(1, 4, dtype=torch.bool), torch.zeros(500, dtype=torch.int64), torch.arange(500)
    whole = draw_modalities(ModalitySampling(present), entities, 5, counters).tolist()
    rest = draw_modalities(ModalitySampling(present, None, None, (0.3, 0.3, 0.3, 0.3)), entities, 5, counters).tolist()
    for row, left in zip(whole, rest, strict=True):
        used = [number for number in left if number not in (EMPTY, 4)]
        assert used == [number for number in row if number in used]
    assert whole != rest
