"""What the benchmark of training compares is the same, and what it times and tells is right."""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks.training.dense import DenseBatch, DenseSibrar
from benchmarks.training.dense_training import Pairs, inputs_of
from sibra_dist.config import load_config
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import open_dataset
from sibra_dist.models import build_model
from sibra_dist.models.single_branch import SingleBranch, SingleBranchConfig
from sibra_dist.training.batching import batch_losses
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted

MODALITIES = ("interactions", "tags", "cover")


class Both:
    """Ours and the dense one, with the same parameters, on the same dataset."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.dataset = open_dataset(write_planted(folder))
        config = load_config(
            TrainConfig,
            "sibrar-cold-item",
            [
                f"dataset={folder}",
                f"model.items.modalities=[{', '.join(MODALITIES)}]",
                "model.items.contrast.weight=0.5",
                "model.users.input_dropout=0",
                "model.items.input_dropout=0",
                *settings,
            ],
        )
        assert isinstance(config.model, SingleBranchConfig)
        self.ours = cast(SingleBranch, build_model(config.model, self.dataset, 1))
        self.dense = DenseSibrar(inputs_of(self.dataset, MODALITIES), config.model, len(self.dataset.training_items))
        self.batches = Batches(self.dataset, *self.ours.sampling(), seed=2, batch_size=32, negatives=4)
        with torch.no_grad():
            for mine, its in self.pairs():
                its.copy_(as_in_dense(mine, its))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters and running statistics of ours, and those of the dense one."""
        users, items = self.ours.users.encoders["interactions"], self.ours.items.encoders
        pairs = [
            (users.weight, self.dense.user_interactions.weight),
            (users.bias, self.dense.user_interactions.bias),
            (items["interactions"].weight, self.dense.item_interactions.weight),
            (items["interactions"].bias, self.dense.item_interactions.bias),
            (cast(nn.Embedding, items["tags"].embedding).weight, self.dense.item_tags.weight),
            (cast(nn.Linear, items["cover"].linear).weight, self.dense.item_vector.weight),
            (cast(nn.Linear, items["cover"].linear).bias, self.dense.item_vector.bias),
        ]
        branches = ((self.ours.user_branch, self.dense.user_branch), (self.ours.item_branch, self.dense.item_branch))
        for mine, its in branches:
            both = zip(mine.layers.state_dict(keep_vars=True).values(), its.state_dict(keep_vars=True).values(), strict=True)
            pairs += [(ours, dense) for ours, dense in both if ours.is_floating_point()]
        return cast(list[tuple[Tensor, Tensor]], pairs)

    def losses(self, step: int) -> tuple[Tensor, Tensor]:
        batch = self.batches.batch(0, step)
        output = self.ours(batch)
        losses = batch_losses("sampled_softmax", batch, output.scores) + sum(output.auxiliary_losses.values())
        return (losses * batch.weights).sum() / batch.total_weight, self.dense(dense_batch(batch))


def as_in_dense(mine: Tensor, its: Tensor) -> Tensor:
    """A table of ours, of which inputs select rows, is the weight of a linear layer transposed."""
    return mine if mine.shape == its.shape else mine.T


def dense_batch(batch: TrainBatch) -> DenseBatch:
    return DenseBatch(batch.users, batch.items, batch.item_modalities)


@pytest.mark.parametrize("exclude_target", ["true", "false"])
def test_the_dense_model_has_our_loss_and_gradients(tmp_path: Path, exclude_target: str) -> None:
    """Without batch normalisation: its statistics are of distinct rows in ours, of occurrences in the other."""
    without = ("model.users.batch_norm_every=-1", "model.items.batch_norm_every=-1", f"model.exclude_target={exclude_target}")
    both = Both(tmp_path / "dataset", *without)
    batch = both.batches.batch(0, 0)
    assert set(batch.item_modalities.unique().tolist()) == {-1, 0, 1, 2}, "every case is in it"
    mine, its = both.losses(0)
    torch.testing.assert_close(its, mine)
    mine.backward()
    its.backward()
    for ours, dense in both.pairs():
        torch.testing.assert_close(dense.grad, as_in_dense(cast(Tensor, ours.grad), dense), atol=1e-6, rtol=1e-4)


def test_with_given_statistics_of_batch_normalisation_the_losses_are_equal_too(tmp_path: Path) -> None:
    both = Both(tmp_path / "dataset")
    for step in range(3):  # gather some
        both.losses(step)
    with torch.no_grad():
        for mine, its in both.pairs():
            its.copy_(as_in_dense(mine, its))
    both.ours.eval()
    both.dense.eval()
    mine, its = both.losses(3)
    torch.testing.assert_close(its, mine)


def test_the_dense_one_draws_as_we_do(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    pairs = Pairs(dataset, MODALITIES, draws=2, negatives=5)
    batch = pairs[list(range(len(pairs)))]
    torch.testing.assert_close(batch.users * dataset.items.count + batch.items[:, 0], pairs.known)
    histories = dataset.users.histories
    known = [set(histories.indices[histories.indptr[user] : histories.indptr[user + 1]].tolist()) for user in range(60)]
    trained = set(dataset.training_items.tolist())
    for user, negatives in zip(batch.users.tolist(), batch.items[:, 1:].tolist(), strict=True):
        assert trained.issuperset(negatives)
        assert not known[user].intersection(negatives)
    first, second = batch.drawn.unbind(-1)
    assert bool((first != second).all())
    present = pairs.present[batch.items]
    for drawn in (first, second):
        assert bool((present.gather(-1, drawn.clamp(min=0)[..., None]).squeeze(-1) | (drawn == -1)).all())
    torch.testing.assert_close((batch.drawn != -1).sum(-1), present.sum(-1).clamp(max=2))
