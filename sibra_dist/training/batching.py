"""What the loop trains on: batches of pairs or of whole users, the hardest of negatives, and the losses of either."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.user_batches import AnyBatch, UserBatch, UserBatches
from sibra_dist.losses import LOSSES, POOL_LOSSES
from sibra_dist.models.base import Recommender
from sibra_dist.training.checks import visible_sampling
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.ranks import Ranks


def make_batches(config: TrainConfig, dataset: Dataset, model: Recommender, ranks: Ranks) -> Batches | UserBatches:
    """The batches of this rank, as the configuration says."""
    training, sampling = config.training, visible_sampling(config, model)
    if training.examples == "users":
        return UserBatches(
            dataset,
            *sampling,
            seed=config.seed,
            batch_size=training.batch_size,
            shown=training.shown_share,
            pool=training.item_pool,
            rank=ranks.rank,
            world=ranks.world,
            parts=training.accumulate,
        )
    return Batches(
        dataset,
        *sampling,
        seed=config.seed,
        batch_size=training.batch_size,
        negatives=training.negatives,
        sampler=training.sampler,
        labels=training.labels,
        rank=ranks.rank,
        world=ranks.world,
        parts=training.accumulate,
    )


def batch_losses(name: str, batch: AnyBatch, scores: Tensor) -> Tensor:
    """The loss of each example, [B], from the scores that the model gives the batch."""
    if isinstance(batch, UserBatch):
        return POOL_LOSSES[name](scores, batch.targets, batch.negatives, batch.log_count)
    return LOSSES[name](scores, batch.labels, batch.log_counts)


def example_told(parts: Sequence[AnyBatch], dataset: Dataset, example: int) -> str:
    """An example in words, by its place in all parts of a step."""
    user = int(torch.cat([batch.users for batch in parts])[example])
    told = f"user {dataset.ids('users')[user].as_py()}"
    if isinstance(parts[0], TrainBatch):
        items = torch.cat([batch.items[:, 0] for batch in parts])
        told += f" with item {dataset.ids('items')[int(items[example])].as_py()}"
    return told


def hardest(model: Recommender, batch: TrainBatch, read: object, count: int) -> TrainBatch:
    """The batch with the `count` of its negatives that the model scores highest, as it is in evaluation mode.

    The batch's own key decides on dropout, so what is scored is what the step then trains, but for batch statistics.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        scores = model.step(batch, read).scores[:, 1:]
    model.train(was_training)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    columns = F.pad(kept + 1, (1, 0))  # and the positive, which is column 0
    draws = batch.item_modalities.shape[-1]
    return replace(
        batch,
        items=batch.items.gather(1, columns),
        item_modalities=batch.item_modalities.gather(1, columns[..., None].expand(-1, -1, draws)),
        log_counts=batch.log_counts.gather(1, kept),
    )
