"""One contract for all samplers, against probabilities that are worked out in plain Python."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from sibra_dist.config import validate
from sibra_dist.data.batches import stream, uniform
from sibra_dist.data.dataset import Csr, Dataset, open_dataset
from sibra_dist.data.negatives import NegativeDraws, NegativeSampler, SamplerConfig, popularity_masses
from sibra_dist.errors import ConfigError
from tests.planted import write_planted

SAMPLERS = {
    "uniform": SamplerConfig(),
    "popularity": SamplerConfig(type="popularity"),
    "popularity squared": SamplerConfig(type="popularity", exponent=2),
    "in_batch": SamplerConfig(type="in_batch"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("negatives") / "dataset", protocol="cold_item"))


@dataclass
class Little:
    """A little world: the items of each user, what may be drawn, and the (user, item) pairs of a batch."""

    histories: list[list[int]]
    training: list[int]
    num_items: int
    pairs: list[tuple[int, int]]

    @property
    def users(self) -> Tensor:
        return torch.tensor([user for user, _ in self.pairs])

    @property
    def positives(self) -> Tensor:
        return torch.tensor([item for _, item in self.pairs])

    def dataset(self, planted: Dataset) -> Dataset:
        """With no more in it than a sampler reads."""
        split = torch.tensor([0 if item in self.training else 2 for item in range(self.num_items)], dtype=torch.int8)
        seen_by = [[user for user, row in enumerate(self.histories) if item in row] for item in range(self.num_items)]
        return replace(
            planted,
            users=replace(planted.users, count=len(self.histories), histories=csr(self.histories)),
            items=replace(planted.items, count=self.num_items, split=split, histories=csr(seen_by)),
        )

    def probabilities(self, config: SamplerConfig, user: int) -> dict[int, float]:
        """Of each item, as the definitions say."""
        count = Counter(item for row in self.histories for item in row)
        in_batch = Counter(item for _, item in self.pairs)
        masses: dict[int, float] = {}
        for item in self.training:
            if config.type == "popularity":
                masses[item] = max(round(count[item] ** config.exponent * 2**16), 1)
            else:
                masses[item] = 1 if config.type == "uniform" else in_batch[item]
        own = set(self.histories[user])
        if own >= set(self.training):
            free = masses if config.type != "in_batch" else dict.fromkeys(self.training, 1.0)
        else:
            free = {item: mass for item, mass in masses.items() if item not in own}
            if not sum(free.values()):  # nothing in the batch that the user does not know
                free = {item: 1.0 for item in self.training if item not in own}
        return {item: mass / sum(free.values()) for item, mass in free.items() if mass}


def csr(rows: Iterable[Iterable[int]]) -> Csr:
    lists = [sorted(row) for row in rows]
    indptr = torch.tensor([0, *[len(row) for row in lists]]).cumsum(0)
    return Csr(indptr, torch.tensor([item for row in lists for item in row], dtype=torch.int32))


@st.composite
def worlds(draw: st.DrawFn) -> Little:
    num_items = draw(st.integers(1, 12))
    training = sorted(draw(st.sets(st.integers(0, num_items - 1), min_size=1)))
    histories = [sorted(draw(st.sets(st.sampled_from(training)))) for _ in range(draw(st.integers(1, 5)))]
    histories[0] = histories[0] or training[:1]
    known = [(user, item) for user, row in enumerate(histories) for item in row]
    return Little(histories, training, num_items, draw(st.lists(st.sampled_from(known), min_size=1, max_size=8)))


@pytest.mark.parametrize("name", SAMPLERS)
@given(little=worlds(), key=st.integers(0, 2**60), count=st.integers(1, 6))
def test_only_what_may_be_drawn_is_drawn_and_its_probability_is_told(
    planted: Dataset, name: str, little: Little, key: int, count: int
) -> None:
    """Training items alone, none of the user's own unless they are all, and log_counts = -log(N q) for the true q."""
    config = SAMPLERS[name].model_copy(update={"log_q": True})
    draws = NegativeDraws(little.dataset(planted), config)
    random = uniform(key, torch.arange(len(little.pairs) * count)).view(-1, count)
    items, log_counts = draws.draw(little.users, random, little.positives)
    assert items.shape == log_counts.shape == random.shape
    assert log_counts.dtype == torch.float32
    for (user, _), row, logs in zip(little.pairs, items.tolist(), log_counts.tolist(), strict=True):
        allowed = little.probabilities(config, user)
        assert set(row) <= set(allowed)
        assert set(row) <= set(little.training)
        assert not set(row) & set(little.histories[user]) or little.histories[user] == little.training
        assert logs == pytest.approx([-math.log(count * allowed[item]) for item in row], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@given(little=worlds())
def test_without_correction_each_negative_stands_for_an_equal_part_of_the_items(
    planted: Dataset, name: str, little: Little
) -> None:
    draws = NegativeDraws(little.dataset(planted), SAMPLERS[name])
    random = uniform(stream(1), torch.arange(len(little.pairs) * 3)).view(-1, 3)
    corrected = NegativeDraws(little.dataset(planted), SAMPLERS[name].model_copy(update={"log_q": True}))
    items, log_counts = draws.draw(little.users, random, little.positives)
    assert log_counts.flatten().tolist() == pytest.approx([math.log(len(little.training) / 3)] * random.numel())
    assert torch.equal(items, corrected.draw(little.users, random, little.positives).items)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_frequencies_are_the_stated_probabilities(planted: Dataset, name: str, seed: int) -> None:
    """For a user in the middle of a batch of several, by a chi-square test at one in a million."""
    history = planted.users.histories
    rows = [history.indices[history.indptr[user] : history.indptr[user + 1]].tolist() for user in range(history.num_rows)]
    pairs = [(user, rows[user][step % len(rows[user])]) for step in range(3) for user in range(40)]
    little = Little(rows, planted.training_items.tolist(), planted.items.count, pairs)
    asked = [pair[0] for pair in pairs].index(17)
    count = 40_000
    random = uniform(stream(9, seed), torch.arange(count))[None].expand(len(pairs), -1)[: asked + 1]
    draws = NegativeDraws(planted, SAMPLERS[name])
    drawn = torch.bincount(draws.draw(little.users[: asked + 1], random, little.positives).items[asked], minlength=80)
    stated = torch.zeros(80, dtype=torch.float64)
    for item, probability in little.probabilities(SAMPLERS[name], 17).items():
        stated[item] = probability
    assert len(stated.unique()) > (1 if name == "uniform" else 3)  # there is something to tell apart
    # Items too rare for the test count as one.
    common = stated * count >= 10
    found = [*drawn[common].tolist(), int(drawn[~common].sum())]
    expected = [*(stated[common] * count).tolist(), float(stated[~common].sum() * count)]
    assert drawn[stated == 0].sum() == 0
    keep = slice(None) if expected[-1] >= 10 else slice(-1)
    total = sum(expected[keep]) / sum(found[keep])
    assert chisquare([value * total for value in found[keep]], expected[keep]).pvalue > 1e-6


@given(data=st.data(), num_items=st.integers(1, 15))
def test_every_item_is_drawn_by_as_many_numbers_as_its_mass(data: st.DataObject, num_items: int) -> None:
    """Over the numbers below the free mass: so even numbers give exact probabilities."""
    masses = data.draw(st.lists(st.integers(0, 4), min_size=num_items, max_size=num_items).filter(any))
    history = sorted(data.draw(st.sets(st.integers(0, num_items - 1))))
    sampler = NegativeSampler(csr([[], history, [0]]), torch.tensor(masses))
    free = {item: mass for item, mass in enumerate(masses) if mass and item not in history}
    expected = free or {item: mass for item, mass in enumerate(masses) if mass}
    drawn = sampler.sample(torch.tensor([1]), torch.arange(sum(expected.values()))[None])[0].tolist()
    assert Counter(drawn) == expected
    assert drawn == sorted(drawn)
    assert sampler.exhausted(torch.tensor([1])).tolist() == [not free]


def test_uniform_negatives_are_those_of_the_first_version() -> None:
    """Recorded before there were others, so that runs from then can be repeated."""
    histories = csr([[1, 2, 6], [], [0, 1, 2, 3, 5, 6, 7, 9]])
    masses = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 0, 1])
    sampler = NegativeSampler(histories, masses, unit=True)
    drawn = sampler.sample(torch.tensor([0, 1, 2]), uniform(stream(11), torch.arange(24)).view(3, 8))
    assert drawn.tolist() == [[0, 7, 3, 7, 0, 9, 7, 9], [6, 2, 9, 3, 1, 0, 6, 0], [6, 7, 9, 3, 9, 2, 6, 2]]


def test_users_who_have_seen_everything_are_counted(planted: Dataset) -> None:
    little = Little([[0, 2, 3], [0, 3], [0, 2, 3], []], [0, 2, 3], 4, [(0, 0)])
    assert NegativeDraws(little.dataset(planted), SAMPLERS["in_batch"]).saturated_users == 2


@given(
    counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=30),
    exponent=st.floats(0, 2),
)
def test_popularities_are_proportional_to_powers_and_their_sums_fit(counts: list[int], exponent: float) -> None:
    masses = popularity_masses(torch.tensor(counts), exponent).tolist()
    assert min(masses) >= 1
    assert sum(masses) <= 2**46 + len(masses)
    assert sum(count * mass for count, mass in zip(counts, masses, strict=True)) < 2**62
    scale = masses[counts.index(max(counts))] / max(float(max(counts)) ** exponent, 2**-16)
    for count, mass in zip(counts, masses, strict=True):
        assert mass == pytest.approx(max(count**exponent * scale, 1), rel=1e-4, abs=1)


def test_a_popular_item_weighs_exactly_as_its_power() -> None:
    assert popularity_masses(torch.tensor([0, 1, 16, 81]), 0.75).tolist() == [1, 2**16, 8 * 2**16, 27 * 2**16]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool": 50, "log_q": True}, r"the highest-scored of a pool have no known probability: set log_q to false, or pool"),
        ({"type": "popular"}, r"type: input should be 'uniform', 'popularity' or 'in_batch'"),
        ({"exponent": -1}, r"exponent: input should be greater than or equal to 0"),
        ({"pool": 0}, r"pool: input should be greater than or equal to 1"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_told(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(SamplerConfig, values, where="test")
