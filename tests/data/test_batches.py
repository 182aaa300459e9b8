import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sibra_dist.data.batches import (
    Batches,
    ModalitySampling,
    TrainBatch,
    permute,
    stream,
)
from sibra_dist.data.dataset import Csr, Dataset, open_dataset
from sibra_dist.data.negatives import SamplerConfig
from sibra_dist.errors import ConfigError
from tests.planted import planted_weight, write_planted

SAMPLERS = {
    "uniform": SamplerConfig(),
    "uniform corrected": SamplerConfig(log_q=True),
    "popularity": SamplerConfig(type="popularity", log_q=True),
    "in_batch": SamplerConfig(type="in_batch", log_q=True),
    "pool": SamplerConfig(pool=7),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("batches") / "dataset", protocol="cold_item"))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("weighted") / "dataset"
    return open_dataset(write_planted(folder, protocol="random", columns=("weights",)))


def make(dataset: Dataset, *, batch_size: int = 50, seed: int = 0, negatives: int = 3, **settings: Any) -> Batches:
    users = ModalitySampling(torch.ones(dataset.users.count, 2, dtype=torch.bool), 1)
    items = ModalitySampling(torch.ones(dataset.items.count, 3, dtype=torch.bool), 2)
    return Batches(dataset, users, items, seed=seed, batch_size=batch_size, negatives=negatives, **settings)


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


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(world=st.integers(1, 7), batch_size=st.integers(1, 60), epoch=st.integers(0, 3))
def test_the_global_batch_is_the_same_on_any_number_of_ranks(
    weighted: Dataset, sampler: str, world: int, batch_size: int, epoch: int
) -> None:
    settings: dict[str, Any] = {"batch_size": batch_size, "sampler": SAMPLERS[sampler], "labels": "weights"}
    alone = make(weighted, **settings)
    ranks = [make(weighted, rank=rank, world=world, **settings) for rank in range(world)]
    for step in {0, alone.steps_per_epoch - 1}:
        whole = alone.batch(epoch, step)
        parts = [batches.batch(epoch, step) for batches in ranks]
        assert len({part.users.shape for part in parts}) == 1
        for name in ("users", "items", "user_modalities", "item_modalities", "labels", "log_counts"):
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


def test_batches_are_those_of_the_first_version(dataset: Dataset) -> None:
    """Recorded before there were other samplers and draws, so that runs from then can be repeated."""
    batch = make(dataset, seed=7).batch(2, 1)
    assert batch.users[:6].tolist() == [29, 35, 5, 39, 39, 49]
    expected = [[65, 23, 0, 49], [63, 52, 20, 68], [37, 73, 52, 27], [11, 24, 56, 58], [75, 45, 15, 35], [77, 0, 28, 9]]
    assert batch.items[:6].tolist() == expected
    assert int((batch.items * torch.arange(batch.items.numel()).view(batch.items.shape)).sum()) == 877100
    assert batch.user_modalities[:6].flatten().tolist() == [1, 1, 0, 0, 0, 1]
    assert batch.item_modalities[:2].tolist() == [[[0, 1], [1, 0], [2, 1], [1, 2]], [[1, 2], [2, 0], [2, 1], [0, 1]]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_negatives_are_training_items_and_no_positives(dataset: Dataset, sampler: str) -> None:
    batches = make(dataset, negatives=20, sampler=SAMPLERS[sampler])
    allowed = set(dataset.training_items.tolist())
    histories = dataset.users.histories
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(0, step)
        for user, negatives in zip(batch.users.tolist(), batch.items[:, 1:].tolist(), strict=True):
            seen = set(histories.gather(torch.tensor([user]))[0].tolist())
            assert not seen & set(negatives)
            assert set(negatives) <= allowed


def test_users_who_have_seen_everything_are_told_of(tmp_path: Path) -> None:
    dataset = open_dataset(
        write_planted(tmp_path / "dataset", protocol="random", users=8, items=12, per_user=3, features=False)
    )
    assert make(dataset).warning is None
    everything = Csr(torch.arange(9) * 12, torch.arange(12, dtype=torch.int32).repeat(8))
    object.__setattr__(dataset.users, "histories", everything)
    batches = make(dataset)
    assert batches.warning is not None
    assert batches.warning.startswith("8 users have interacted with every training item")
    assert batches.batch(0, 0).items.max() < 12


def test_negatives_of_the_batch_are_positives_of_others_in_it(dataset: Dataset) -> None:
    """Of the whole batch, which this rank sees a third of, and drawn the more often the more often they are positives."""
    settings: dict[str, Any] = {"sampler": SamplerConfig(type="in_batch"), "negatives": 200, "batch_size": 30}
    whole = make(dataset, **settings).batch(1, 2)
    part = make(dataset, rank=1, world=3, **settings).batch(1, 2)
    positives = Counter(whole.items[:, 0].tolist())
    drawn = Counter(part.items[:, 1:].flatten().tolist())
    assert set(drawn) <= set(positives)
    assert set(drawn) > set(part.items[:, 0].tolist())
    twice, once = ([drawn[item] for item, count in positives.items() if count == times] for times in (2, 1))
    assert sum(twice) / len(twice) > 1.5 * sum(once) / len(once)


def test_a_pool_is_drawn_whole(dataset: Dataset) -> None:
    """Each of its items stands for its part of the items: choosing among them later does not change that."""
    batch = make(dataset, negatives=3, sampler=SamplerConfig(pool=8)).batch(0, 0)
    assert batch.items.shape == (50, 9)
    assert batch.item_modalities.shape == (50, 9, 2)
    assert batch.log_counts.unique().tolist() == pytest.approx([math.log(len(dataset.training_items) / 8)])


def test_labels_are_weights_over_the_largest(weighted: Dataset) -> None:
    assert weighted.users.weights is not None
    largest = float(weighted.users.weights.max())
    batches = make(weighted, labels="weights", rank=1, world=2)
    batch = batches.batch(0, batches.steps_per_epoch - 1)
    assert (batch.weights == 0).any()  # padding included
    pairs = zip(batch.users.tolist(), batch.items[:, 0].tolist(), strict=True)
    assert batch.labels.tolist() == pytest.approx([planted_weight(user, item) / largest for user, item in pairs])
    assert batch.labels.dtype == torch.float32


def test_labels_are_1_unless_asked_for(weighted: Dataset) -> None:
    assert make(weighted).batch(0, 0).labels.tolist() == [1.0] * 50


def test_labels_that_the_dataset_lacks_are_told(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"training.labels is weights, but the interactions of .* have none. Set training"):
        make(dataset, labels="weights")


@pytest.mark.parametrize(("lowest", "factor"), [(-1.0, 1.0), (0.0, 0.0)])
def test_weights_that_cannot_be_labels_are_told(weighted: Dataset, lowest: float, factor: float) -> None:
    assert weighted.users.weights is not None
    weights = weighted.users.weights * factor
    weights[3] = lowest
    changed = replace(weighted, users=replace(weighted.users, weights=weights))
    with pytest.raises(ConfigError, match=rf"go from {lowest:g} to [0-9.]+: a label is a share of the largest, from 0 to 1"):
        make(changed, labels="weights")
