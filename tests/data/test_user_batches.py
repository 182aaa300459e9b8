import pytest
import torch

from sibra_dist.data.batches import ModalitySampling
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.user_batches import UserBatch, UserBatches
from tests.planted import write_planted


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("users") / "dataset", protocol="cold_item"))


def batches(dataset: Dataset, **changes: object) -> UserBatches:
    present = [torch.ones(entities.count, 3, dtype=torch.bool) for entities in (dataset.users, dataset.items)]
    users, items = (ModalitySampling(part, 1) for part in present)
    settings = {"seed": 0, "batch_size": 16, "shown": 0.5} | changes
    return UserBatches(dataset, users, items, **settings)


def pairs(dataset: Dataset) -> set[tuple[int, int]]:
    """The training interactions."""
    histories = dataset.users.histories
    rows = torch.repeat_interleave(histories.lengths())
    return set(zip(rows.tolist(), histories.indices.tolist(), strict=True))


def marked(batch: UserBatch, table: torch.Tensor) -> set[tuple[int, int]]:
    """The pairs that a table of the batch marks, for its real users."""
    rows, columns = torch.nonzero(table, as_tuple=True)
    return set(zip(batch.users[rows].tolist(), batch.items[columns].tolist(), strict=True))


@pytest.mark.parametrize("pool", [None, 20])
def test_what_is_not_shown_is_asked_for_and_nothing_else(dataset: Dataset, pool: int | None) -> None:
    training, cold = pairs(dataset), set(torch.nonzero(dataset.items.split != 0).flatten().tolist())
    for step in range(4):
        batch = batches(dataset, pool=pool).batch(0, step)
        everything = {(user, item) for user in batch.users.tolist() for item in batch.items.tolist()}
        own = everything & training
        users, items = (torch.tensor(side) for side in zip(*sorted(own), strict=True))
        shown = {pair for pair, yes in zip(sorted(own), batch.shown(users, items).tolist(), strict=True) if yes}
        assert marked(batch, batch.targets) == own - shown
        assert marked(batch, batch.negatives) == everything - training
        assert not cold & set(batch.items.tolist())
        assert torch.equal(batch.shown(users, items), batch.shown.of_items()(items, users))


def test_an_epoch_has_every_user_with_a_history_once(dataset: Dataset) -> None:
    made = batches(dataset)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(made.steps_per_epoch):
            batch = made.batch(epoch, step)
            seen += batch.users[: made.num_examples - 16 * step].tolist()
        assert sorted(seen) == torch.nonzero(dataset.users.histories.lengths()).flatten().tolist()
    assert made.batch(0, 0).users.tolist() != made.batch(1, 0).users.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_batch_of_one(dataset: Dataset, world: int) -> None:
    whole = batches(dataset, pool=30)
    last = whole.steps_per_epoch - 1
    for step in (0, last):
        alone = whole.batch(1, step)
        parts = [batches(dataset, pool=30, rank=rank, world=world).batch(1, step) for rank in range(world)]
        real = [torch.cat([getattr(part, name) for part in parts]) for name in ("users", "targets", "negatives", "weights")]
        kept = min(16, whole.num_examples - 16 * step)
        for name, joined in zip(("users", "targets", "negatives", "weights"), real, strict=True):
            assert torch.equal(joined[:kept], getattr(alone, name)[:kept]), name
            if name == "weights":
                assert not joined[kept:].any()
        for part in parts:
            assert torch.equal(part.items, alone.items)
            assert torch.equal(part.item_modalities, alone.item_modalities)
            assert (part.total_weight, part.noise_key, part.shown) == (alone.total_weight, alone.noise_key, alone.shown)
        assert alone.total_weight == float(alone.weights.sum()) == float(alone.targets.any(1)[:kept].sum())


def test_a_step_shows_another_part_each_time_and_about_the_share_asked_for(dataset: Dataset) -> None:
    shares = []
    made = batches(dataset, shown=0.8, batch_size=64)
    for epoch in range(20):
        batch = made.batch(epoch, 0)
        shares.append(1 - float(batch.targets.sum()) / float((~batch.negatives).sum()))
    # About 550 interactions each: five standard deviations of the mean of 20.
    assert sum(shares) / 20 == pytest.approx(0.8, abs=5 * (0.16 / (20 * 550)) ** 0.5)
    assert len(set(shares)) > 10


def test_a_user_of_whom_nothing_is_asked_weighs_nothing(dataset: Dataset) -> None:
    """Nearly everything is shown, so some users have no target."""
    batch = batches(dataset, shown=0.97, batch_size=60).batch(0, 0)
    assert torch.equal(batch.weights > 0, batch.targets.any(1))
    assert 0 < batch.weights.sum() < 60
    nothing = batches(dataset, shown=1 - 1e-12, batch_size=60).batch(0, 0)
    assert (float(nothing.weights.sum()), nothing.total_weight) == (0.0, 1.0)


def test_interactions_of_which_none_is_shown_are_not_there(dataset: Dataset) -> None:
    """As in evaluation: whoever has nothing else is "unknown", and is told apart from one of whom something is shown."""
    present = [entities.histories.lengths()[:, None] > 0 for entities in (dataset.users, dataset.items)]
    users, items = (ModalitySampling(part, 1, interactions=0) for part in present)
    batch = UserBatches(dataset, users, items, seed=0, batch_size=60, shown=0.1).batch(0, 0)
    for drawn, entities, histories, shown in (
        (batch.user_modalities, batch.users, dataset.users.histories, batch.shown),
        (batch.item_modalities, batch.items, dataset.items.histories, batch.shown.of_items()),
    ):
        found = []
        for entity in entities.tolist():
            columns, _ = histories.gather(torch.tensor([entity]))
            found.append(bool(shown(torch.full_like(columns, entity), columns).any()))
        assert (drawn[:, 0] == 0).tolist() == found
        assert 0 < sum(found) < len(found)
