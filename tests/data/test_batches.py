from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sibra_dist.data.batches import (
    Batches,
    ModalitySampling,
    NegativeSampler,
    TrainBatch,
    draw_modalities,
    permute,
    stream,
    uniform,
)
from sibra_dist.data.dataset import Csr, Dataset, open_dataset
from tests.planted import write_planted


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("batches") / "dataset", protocol="cold_item"))


def make(
    dataset: Dataset, *, rank: int = 0, world: int = 1, batch_size: int = 50, seed: int = 0, negatives: int = 3
) -> Batches:
    users = ModalitySampling(torch.ones(dataset.users.count, 2, dtype=torch.bool), 1)
    items = ModalitySampling(torch.ones(dataset.items.count, 3, dtype=torch.bool), 2)
    return Batches(dataset, users, items, seed=seed, batch_size=batch_size, negatives=negatives, rank=rank, world=world)


@given(size=st.integers(1, 5000), key=st.integers(-(2**63), 2**63 - 1))
def test_permutation_meets_every_number_once(size: int, key: int) -> None:
    assert permute(torch.arange(size), size, key).sort().values.tolist() == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 2**20 + 1])
def test_permutation_of_large_and_of_tiny_ranges(size: int) -> None:
    assert torch.equal(permute(torch.arange(size), size, stream(1, 2)).sort().values, torch.arange(size))


@given(size=st.integers(2**40, 2**45), places=st.lists(st.integers(0, 2**40 - 1), min_size=2, max_size=50, unique=True))
def test_permutation_of_a_huge_range_stays_inside_and_apart(size: int, places: list[int]) -> None:
    values = permute(torch.tensor(places), size, stream(3))
    assert int(values.min()) >= 0
    assert int(values.max()) < size
    assert len(set(values.tolist())) == len(places)


def test_permutations_are_even_over_keys() -> None:
    """Where number 0 of 7 goes is uniform over many keys: a chi-square test at one in a million."""
    landed = torch.cat([permute(torch.tensor([0]), 7, stream(key)) for key in range(3500)])
    assert chisquare(torch.bincount(landed, minlength=7).numpy()).pvalue > 1e-6


def test_an_epoch_sees_every_positive_once(dataset: Dataset) -> None:
    batches = make(dataset)
    pairs = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(4, step)
        real = batch.weights > 0
        assert batch.total_weight == float(real.sum())
        pairs += list(zip(batch.users[real].tolist(), batch.items[real, 0].tolist(), strict=True))
    histories = dataset.users.histories
    users = torch.repeat_interleave(histories.lengths()).tolist()
    assert sorted(pairs) == list(zip(users, histories.indices.tolist(), strict=True))


@given(world=st.integers(1, 7), batch_size=st.integers(1, 60), epoch=st.integers(0, 3))
def test_the_global_batch_is_the_same_on_any_number_of_ranks(dataset: Dataset, world: int, batch_size: int, epoch: int) -> None:
    alone = make(dataset, batch_size=batch_size)
    ranks = [make(dataset, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    for step in {0, alone.steps_per_epoch - 1}:
        whole = alone.batch(epoch, step)
        parts = [batches.batch(epoch, step) for batches in ranks]
        assert len({part.users.shape for part in parts}) == 1
        for name in ("users", "items", "user_modalities", "item_modalities"):
            joined = torch.cat([getattr(part, name)[part.weights > 0] for part in parts])
            assert torch.equal(joined, getattr(whole, name)[whole.weights > 0])
        assert {part.total_weight for part in parts} == {whole.total_weight}
        assert {part.noise_key for part in parts} == {whole.noise_key}


def test_epochs_seeds_and_steps_differ(dataset: Dataset) -> None:
    def content(batch: TrainBatch) -> list[int]:
        return [*batch.users.tolist(), *batch.items.flatten().tolist()]

    batches = make(dataset)
    seen = [content(batches.batch(0, 0)), content(batches.batch(1, 0)), content(batches.batch(0, 1))]
    seen.append(content(make(dataset, seed=1).batch(0, 0)))
    assert len({tuple(one) for one in seen}) == 4
    assert batches.batch(0, 0).noise_key != batches.batch(0, 1).noise_key
    assert content(batches.batch(0, 0)) == seen[0]


def test_padding_repeats_an_example_of_the_batch(dataset: Dataset) -> None:
    batch = make(dataset, rank=2, world=3, batch_size=50).batch(0, make(dataset).steps_per_epoch - 1)
    first = make(dataset, rank=0, world=3, batch_size=50).batch(0, make(dataset).steps_per_epoch - 1)
    padded = batch.weights == 0
    assert padded.any()
    assert (batch.users[padded] == first.users[0]).all()
    assert (batch.items[padded] == first.items[0]).all()


def test_negatives_are_training_items_and_no_positives(dataset: Dataset) -> None:
    batches = make(dataset, negatives=20)
    allowed = set(dataset.training_items.tolist())
    histories = dataset.users.histories
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(0, step)
        for user, negatives in zip(batch.users.tolist(), batch.items[:, 1:].tolist(), strict=True):
            seen = set(histories.gather(torch.tensor([user]))[0].tolist())
            assert not seen & set(negatives)
            assert set(negatives) <= allowed


@given(data=st.data(), num_items=st.integers(1, 30))
def test_every_unseen_candidate_is_drawn_by_exactly_one_number(data: st.DataObject, num_items: int) -> None:
    """Over the numbers 0..unseen-1 the sampler is a bijection, so uniform numbers give uniform negatives."""
    candidates = sorted(data.draw(st.sets(st.integers(0, num_items - 1), min_size=1)))
    seen = sorted(data.draw(st.sets(st.sampled_from(candidates))))
    histories = Csr(torch.tensor([0, 0, len(seen)]), torch.tensor(seen, dtype=torch.int32))
    sampler = NegativeSampler(histories, torch.tensor(candidates), num_items)
    unseen = [item for item in candidates if item not in seen]
    drawn = sampler.sample(torch.tensor([1]), torch.arange(len(unseen) or len(candidates))[None])
    assert drawn[0].tolist() == (unseen or candidates)


def test_negatives_are_uniform() -> None:
    histories = Csr(torch.tensor([0, 3]), torch.tensor([1, 2, 6], dtype=torch.int32))
    sampler = NegativeSampler(histories, torch.tensor([0, 1, 2, 3, 5, 6, 7, 9]), 10)
    random = uniform(stream(5), torch.arange(20_000))[:, None]
    drawn = sampler.sample(torch.zeros(20_000, dtype=torch.int64), random).flatten()
    counts = torch.bincount(drawn, minlength=10)
    assert counts[[1, 2, 4, 6, 8]].sum() == 0
    assert chisquare(counts[[0, 3, 5, 7, 9]].numpy()).pvalue > 1e-6


def test_users_who_have_seen_everything_are_counted(tmp_path: Path) -> None:
    dataset = open_dataset(
        write_planted(tmp_path / "dataset", protocol="random", users=8, items=12, per_user=3, features=False)
    )
    assert make(dataset).saturated_users == 0
    everything = Csr(torch.arange(9) * 12, torch.arange(12, dtype=torch.int32).repeat(8))
    object.__setattr__(dataset.users, "histories", everything)
    batches = make(dataset)
    assert batches.saturated_users == 8
    assert batches.batch(0, 0).items.max() < 12


@given(
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=8),
    draws=st.integers(1, 4),
    key=st.integers(0, 2**60),
)
def test_drawn_modalities_are_present_and_distinct(present: list[list[bool]], draws: int, key: int) -> None:
    sampling = ModalitySampling(torch.tensor(present), draws)
    drawn = draw_modalities(sampling, torch.arange(len(present)), key, torch.arange(len(present))).tolist()
    assert all(len(row) == draws for row in drawn)
    for row, there in zip(drawn, present, strict=True):
        available = [number for number, is_there in enumerate(there) if is_there]
        if not available:
            assert set(row) == {3}
            continue
        assert set(row) <= set(available)
        assert len(set(row)) == min(draws, len(available), 3)


def test_drawn_modalities_are_uniform() -> None:
    sampling = ModalitySampling(torch.tensor([[True, False, True, True]]), 2)
    count = 12_000
    drawn = draw_modalities(sampling, torch.zeros(count, dtype=torch.int64), stream(9), torch.arange(count))
    pairs = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
    possible = [first * 4 + second for first in (0, 2, 3) for second in (0, 2, 3) if first != second]
    assert pairs.sum() == pairs[possible].sum()
    assert chisquare(pairs[possible].numpy()).pvalue > 1e-6
