"""What the loop trains on: batches of pairs or of whole users, and the losses of either."""

from torch import Tensor

from sibra_dist.data.batches import Batches
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
