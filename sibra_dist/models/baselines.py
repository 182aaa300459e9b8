"""Baselines that learn nothing by gradient: they show what a figure is worth."""

from typing import Literal

import torch
from torch import Tensor

from sibra_dist.data.batches import stream, uniform
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.models.base import ModelConfig, Recommender


class PopConfig(ModelConfig):
    """Most popular items first."""

    type: Literal["pop"] = "pop"


class Pop(Recommender):
    """Scores an item by its number of training interactions; cold items all tie at zero."""

    trainable = False
    popularity: Tensor

    def __init__(self, config: PopConfig, dataset: Dataset) -> None:
        """Count the training interactions."""
        super().__init__()
        self.register_buffer("popularity", dataset.items.histories.lengths().float(), persistent=False)

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Ones [n, 1]."""
        return torch.ones(users.numel(), 1, device=self.popularity.device)

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Popularities [n, 1]."""
        return self.popularity[items.to(self.popularity.device), None]


class RandomConfig(ModelConfig):
    """Items in random order."""

    type: Literal["random"] = "random"
    seed: int = 0
    """Each seed is another order, for each user another."""


class Random(Recommender):
    """Scores a pair by a hash of (seed, user, item): the same on any number of ranks."""

    trainable = False
    key: Tensor

    def __init__(self, config: RandomConfig, dataset: Dataset) -> None:
        """Remember the seed and the sizes."""
        super().__init__()
        self._key = stream(config.seed)
        # A buffer, so that this model is on a device as the others are.
        self.register_buffer("key", torch.tensor(self._key), persistent=False)
        self._num_items = dataset.items.known

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """The users themselves, int64 [n, 1]."""
        return users[:, None].to(self.key.device)

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """The items themselves, int64 [n, 1]."""
        return items[:, None].to(self.key.device)

    @property
    def score_name(self) -> None:
        """None: there are no embeddings."""
        return None

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Random numbers [U, I] in [0, 1)."""
        return uniform(self._key, users * self._num_items + items.T).double().div(2.0**62).float()
