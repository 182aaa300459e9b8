"""Batches of whole users: a step shows a part of the interactions, and asks for the rest among one pool of items.

Where `sibra_dist.data.batches` makes an example of every interaction, with negatives of its own, here a user is an example.
A hash decides of every interaction whether a step shows it: what is shown is read by the encoders, of users and of items
alike, and the others of the batch's users are what they are asked for, so no input holds its own answer. All users of
a batch are scored against the same items, so that an item is encoded once a step and scores are one product of matrices.

As there, a batch is a pure function of (seed, epoch, step), and the same for any number of ranks.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.batches import (
    ITEM_MODALITIES,
    NOISE,
    ORDER,
    POOL,
    SHOWN,
    USER_MODALITIES,
    ModalitySampling,
    TrainBatch,
    draw_modalities,
    in_share,
    permute,
    stream,
    uniform,
)
from sibra_dist.data.dataset import Csr, Dataset


class Shown(NamedTuple):
    """Which training interactions a step shows."""

    key: int
    share: float
    num_items: int
    by_item: bool = False

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether each interaction (users[n], items[n]), or from the items' side (items[n], users[n]), is shown: bool [n]."""
        users, items = (columns, rows) if self.by_item else (rows, columns)
        return in_share(uniform(self.key, users.long() * self.num_items + items), self.share)

    def of_items(self) -> "Shown":
        """The same, asked from the items' side."""
        return self._replace(by_item=True)


@dataclass(frozen=True)
class UserBatch:
    """One rank's part of a global batch of B' users; here B = B' / ranks, padded. All ranks have the same P items."""

    users: Tensor
    """int64 [B]"""
    items: Tensor
    """int64 [P], ascending: the pool"""
    user_modalities: Tensor
    """int64 [B, D]: what `draw_modalities` gives for the user side"""
    item_modalities: Tensor
    """int64 [P, D], likewise for the item side"""
    targets: Tensor
    """bool [B, P]: interactions that are asked for"""
    negatives: Tensor
    """bool [B, P]: items that the user has no training interaction with"""
    log_count: float
    """log of how many training items each item of the pool stands for"""
    weights: Tensor
    """float32 [B]: 1, or 0 for padding and for a user of whom nothing in the pool is asked for"""
    total_weight: float
    """Sum of the weights over all ranks, at least 1: known without communication."""
    noise_key: int
    """Seeds this step's dropout; the same on every rank."""
    shown: Shown
    """Which interactions the encoders may read in this step."""


AnyBatch = TrainBatch | UserBatch


class UserBatches:
    """The batches of one rank, made where the dataset's tensors are."""

    def __init__(
        self,
        dataset: Dataset,
        users: ModalitySampling,
        items: ModalitySampling,
        *,
        seed: int,
        batch_size: int,
        shown: float,
        pool: int | None = None,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ) -> None:
        """Prepare to make batches.

        Args:
            dataset: what to draw from.
            users: how modalities of users are drawn.
            items: how modalities of items are drawn.
            seed: of everything random.
            batch_size: users in a global batch.
            shown: share of the interactions that a step shows.
            pool: training items in a step, drawn anew in each without repetition; None: all of them.
            rank: this rank.
            world: number of ranks.
            parts: into which a rank's share of a batch is divided, as if each were a rank's.
        """
        self._device = dataset.device
        self._histories = dataset.users.histories
        self._item_histories = dataset.items.histories
        self._users, self._items = users, items
        self._learners = torch.nonzero(self._histories.lengths() > 0).flatten()
        self._training_items = dataset.training_items
        self._num_items = dataset.items.count
        self._pool = min(pool or len(self._training_items), len(self._training_items))
        self._seed = seed
        self._batch_size = batch_size
        self._share = shown
        self._rank, self._parts = rank, parts
        self._per_part = math.ceil(batch_size / (world * parts))
        self.num_examples = len(self._learners)
        self.steps_per_epoch = math.ceil(self.num_examples / batch_size)

    @property
    def warning(self) -> str | None:
        """What a person should know of these batches."""
        saturated = int((self._histories.lengths() >= len(self._training_items)).sum())
        if not saturated:
            return None
        return f"{saturated} users have interacted with every training item, so they have no negatives and teach little"

    def batch(self, epoch: int, step: int, part: int = 0) -> UserBatch:
        """This rank's share of the global batch of a step, or a part of it."""
        first = step * self._batch_size
        last = min(first + self._batch_size, self.num_examples)
        order = stream(self._seed, ORDER, epoch)
        everyone = self._learners[permute(torch.arange(first, last, device=self._device), self.num_examples, order)]
        start = (self._rank * self._parts + part) * self._per_part
        slots = start + torch.arange(self._per_part, device=self._device)
        real = slots < len(everyone)
        # Padding repeats the batch's first user, so that it adds nothing to what is encoded.
        slots = torch.where(real, slots, 0)
        users = everyone[slots]

        items = self._training_items
        if self._pool < len(items):
            drawn = torch.arange(self._pool, device=self._device)
            items = items[permute(drawn, len(items), stream(self._seed, POOL, epoch, step)).sort().values]
        place = torch.full((self._num_items,), -1, device=self._device)
        place[items] = torch.arange(len(items), device=self._device)
        shown = Shown(stream(self._seed, SHOWN, epoch, step), self._share, self._num_items)

        item_key = stream(self._seed, ITEM_MODALITIES, epoch, step)

        columns, _ = self._histories.gather(everyone)
        rows = torch.repeat_interleave(self._histories.lengths(everyone))
        asked = ~shown(everyone[rows], columns) & (place[columns.long()] >= 0)
        answerable = torch.zeros(len(everyone), dtype=torch.bool, device=self._device)
        answerable[rows[asked]] = True
        targets, negatives = self._tables(users, place, len(items), shown)
        return UserBatch(
            users=users,
            items=items,
            user_modalities=_draw(
                self._users, users, self._histories, shown, stream(self._seed, USER_MODALITIES, epoch), first + slots
            ),
            item_modalities=_draw(self._items, items, self._item_histories, shown.of_items(), item_key, items),
            targets=targets,
            negatives=negatives,
            log_count=math.log(len(self._training_items) / len(items)),
            weights=(real & answerable[slots]).float(),
            total_weight=float(max(int(answerable.sum()), 1)),
            noise_key=stream(self._seed, NOISE, epoch, step),
            shown=shown,
        )

    def _tables(self, users: Tensor, place: Tensor, size: int, shown: Shown) -> tuple[Tensor, Tensor]:
        columns, _ = self._histories.gather(users)
        rows = torch.repeat_interleave(self._histories.lengths(users))
        places = place[columns.long()]
        inside = places >= 0
        rows, columns, places = rows[inside], columns[inside], places[inside]
        negatives = torch.ones(len(users), size, dtype=torch.bool, device=self._device)
        negatives[rows, places] = False
        targets = torch.zeros_like(negatives)
        targets[rows, places] = ~shown(users[rows], columns)
        return targets, negatives


def _draw(sampling: ModalitySampling, entities: Tensor, histories: Csr, shown: Shown, key: int, counters: Tensor) -> Tensor:
    """`draw_modalities`, where an entity of whose interactions nothing is shown has none."""
    if sampling.interactions is not None:
        columns, _ = histories.gather(entities)
        owners = torch.repeat_interleave(histories.lengths(entities))
        counts = torch.bincount(owners[shown(entities[owners], columns)], minlength=len(entities))
        present = sampling.present[entities]
        present[:, sampling.interactions] &= counts > 0
        sampling, entities = sampling._replace(present=present), torch.arange(len(entities), device=entities.device)
    return draw_modalities(sampling, entities, key, counters)
