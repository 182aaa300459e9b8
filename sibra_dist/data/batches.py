"""Which positives, negatives and modalities a step sees: a pure function of (seed, epoch, step).

A worked example. Training holds nnz = 10 interactions, the global batch is 4, and 2 ranks train. An epoch is 3 steps.
A seeded permutation of 0..9 gives the order, say 7 2 9 0 | 3 8 1 5 | 6 4. Step 0 sees positives 7 2 9 0: rank 0 takes
7 2 and rank 1 takes 9 0. In step 2 rank 0 takes 6 4, and rank 1 two padding examples of weight 0. With 1 rank, or 4,
the same four positives make step 0, with the same negatives and modalities, because all that is random is a hash of the
seed, the epoch, the place in the epoch and the slot. So nothing is shuffled, stored or communicated, every rank makes
the same number of steps, and training resumes anywhere, on any number of ranks, from the two integers (epoch, step).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.data.dataset import Dataset
from sibra_dist.data.negatives import UNIFORM, NegativeDraws, SamplerConfig
from sibra_dist.errors import ConfigError

# Streams of random numbers, so that no two purposes share one.
ORDER, NEGATIVES, USER_MODALITIES, ITEM_MODALITIES, NOISE, HIDING, DROPPED, SHOWN, POOL, COMPARED = range(1, 11)

EMPTY = -1
"""Stands in a slot of drawn modalities that is not used."""

Labels = Literal["binary", "weights"]

_BITS = (1 << 64) - 1
_ROUNDS = 6


class ModalitySampling(NamedTuple):
    """How a model wants the modalities of one side drawn in training."""

    present: Tensor
    """bool [entities, M]"""
    draws: int | None = None
    """Distinct modalities drawn for every occurrence of an entity, uniformly from those left; None: all of them."""
    first: int | None = None
    """This modality is always the first drawn, where it is left."""
    dropout: tuple[float, ...] | None = None
    """For each modality, the probability that an occurrence of an entity loses it before the draw."""
    interactions: int | None = None
    """Which modality is the training interactions, if it is read: a step that shows none of an entity's hides it."""


@dataclass(frozen=True)
class TrainBatch:
    """One rank's part of a global batch of B' examples; here B = B' / ranks, padded."""

    users: Tensor
    """int64 [B]"""
    items: Tensor
    """int64 [B, 1+N]: column 0 is the positive, the others are negatives"""
    user_modalities: Tensor
    """int64 [B, D]: what `draw_modalities` gives for the user side"""
    item_modalities: Tensor
    """int64 [B, 1+N, D], likewise for the item side"""
    labels: Tensor
    """float32 [B]: of the positive: 1, or the interaction's weight over the largest of all"""
    log_counts: Tensor
    """float32 [B, N]: log of how many items each negative stands for"""
    weights: Tensor
    """float32 [B]: 1, or 0 for padding"""
    total_weight: float
    """Sum of the weights over all ranks: known without communication."""
    noise_key: int
    """Seeds this step's dropout; the same on every rank."""
    shown: ClassVar[None] = None
    """All interactions are shown; see `sibra_dist.data.user_batches` for batches of which that is not so."""


class Batches:
    """The batches of one rank, made where the dataset's tensors are."""

    def __init__(
        self,
        dataset: Dataset,
        users: ModalitySampling,
        items: ModalitySampling,
        *,
        seed: int,
        batch_size: int,
        negatives: int,
        sampler: SamplerConfig = UNIFORM,
        labels: Labels = "binary",
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
            batch_size: positives in a global batch.
            negatives: negatives for every positive, drawn with replacement; where the sampler has a pool, its size counts.
            sampler: how negatives are drawn.
            labels: what positives are labelled with.
            rank: this rank.
            world: number of ranks.
            parts: into which a rank's share of a batch is divided, as if each were a rank's.

        Raises:
            ConfigError: the dataset cannot serve the labels.
        """
        self._device = dataset.device
        self._histories = dataset.users.histories
        self._negatives = NegativeDraws(dataset, sampler)
        self._users, self._items = users, items
        self._label_of = None
        if labels == "weights":
            weights, largest = label_weights(dataset)
            self._label_of = weights / largest
        self._seed = seed
        self._batch_size = batch_size
        self._num_negatives = sampler.pool or negatives
        self._rank, self._parts = rank, parts
        self._per_part = math.ceil(batch_size / (world * parts))
        self.num_examples = self._histories.nnz
        self.steps_per_epoch = math.ceil(self.num_examples / batch_size)

    @property
    def warning(self) -> str | None:
        """What a person should know of these batches."""
        saturated = self._negatives.saturated_users
        if not saturated:
            return None
        return f"{saturated} users have interacted with every training item, so their negatives are items they know"

    def batch(self, epoch: int, step: int, part: int = 0) -> TrainBatch:
        """This rank's share of the global batch of a step, or a part of it."""
        first = step * self._batch_size
        last = min(first + self._batch_size, self.num_examples)
        start = first + (self._rank * self._parts + part) * self._per_part
        slots = start + torch.arange(self._per_part, device=self._device)
        real = slots < last
        # Padding repeats the batch's first example whole, so that it adds no entity to what is encoded.
        places = torch.where(real, slots, first)

        order = stream(self._seed, ORDER, epoch)
        numbers = permute(places, self.num_examples, order)
        users = torch.searchsorted(self._histories.indptr, numbers, right=True) - 1
        positives = self._histories.indices[numbers].long()
        slot = torch.arange(self._num_negatives, device=self._device)
        random = uniform(stream(self._seed, NEGATIVES, epoch), places[:, None] * self._num_negatives + slot)
        of_all = None
        if self._negatives.reads_batch:  # the whole global batch, found on every rank without asking the others
            whole = torch.arange(first, last, device=self._device)
            of_all = self._histories.indices[permute(whole, self.num_examples, order)].long()
        negatives = self._negatives.draw(users, random, of_all)
        items = torch.cat([positives[:, None], negatives.items], dim=1)

        column = torch.arange(items.shape[1], device=self._device)
        return TrainBatch(
            users=users,
            items=items,
            user_modalities=draw_modalities(self._users, users, stream(self._seed, USER_MODALITIES, epoch), places),
            item_modalities=draw_modalities(
                self._items, items, stream(self._seed, ITEM_MODALITIES, epoch), places[:, None] * items.shape[1] + column
            ),
            labels=torch.ones_like(real, dtype=torch.float32) if self._label_of is None else self._label_of[numbers],
            log_counts=negatives.log_counts,
            weights=real.float(),
            total_weight=float(last - first),
            noise_key=stream(self._seed, NOISE, epoch, step),
        )


def label_weights(dataset: Dataset) -> tuple[Tensor, float]:
    """The weights of the training interactions, float32 [nnz], and the largest.

    Raises:
        ConfigError: the dataset has none, or they cannot be labels: some are negative, or none is positive.
    """
    weights = dataset.users.weights
    advice = "Set training.labels to binary, or prepare the dataset with"
    if weights is None:
        raise ConfigError(f"training.labels is weights, but the interactions of {dataset.place} have none. {advice} weights")
    smallest, largest = (float(value) for value in weights.aminmax()) if len(weights) else (0.0, 1.0)
    if smallest < 0 or largest <= 0:
        raise ConfigError(
            f"training.labels is weights, but those of {dataset.place} go from {smallest:g} to {largest:g}: a label is a share "
            f"of the largest, from 0 to 1. {advice} other weights"
        )
    return weights, largest


def draw_modalities(sampling: ModalitySampling, entities: Tensor, key: int, counters: Tensor) -> Tensor:
    """Draw distinct modalities from those present, once those that drop out are left out.

    Args:
        sampling: presence [entities, M], and how to draw.
        entities: int64 [*].
        key: of the random stream.
        counters: int64 [*], one of its own for each occurrence.

    Returns:
        int64 [*, D] with D = draws, or M where all are drawn: numbers of modalities in drawn order, and then EMPTY in the
        slots that are not used. An entity with nothing left has M ("unknown") in the first slot.
    """
    present = sampling.present[entities]
    num_modalities = present.shape[-1]
    slots = num_modalities if sampling.draws is None else sampling.draws
    if num_modalities == 1 and sampling.dropout is None:  # nothing to draw
        return F.pad(torch.where(present, 0, 1), (0, slots - 1), value=EMPTY)
    numbers = counters[..., None] * num_modalities + torch.arange(num_modalities, device=present.device)
    if sampling.dropout is not None:
        random = uniform(stream(key, DROPPED), numbers)
        dropped = [in_share(random[..., number], rate) for number, rate in enumerate(sampling.dropout)]
        present = present & ~torch.stack(dropped, dim=-1)
    keys = uniform(key, numbers)
    if sampling.first is not None:
        keys[..., sampling.first] = -1
    keys = torch.where(present, keys, torch.iinfo(torch.int64).max)
    drawn = keys.topk(min(slots, num_modalities), dim=-1, largest=False, sorted=True).indices
    drawn = F.pad(drawn, (0, slots - drawn.shape[-1]))
    available = present.sum(-1, keepdim=True)
    slot = torch.arange(slots, device=drawn.device)
    drawn = torch.where(slot < available, drawn, EMPTY)
    return torch.where((slot == 0) & (available == 0), num_modalities, drawn)


def permute(values: Tensor, size: int, key: int) -> Tensor:
    """A pseudo-random permutation of range(size), evaluated at `values` only: int64 -> int64, in O(1) memory.

    A Feistel network (Luby and Rackoff 1988) over pairs (left, right) of Z_a x Z_b with a·b just above `size`: a round
    adds a hash of one half to the other, which can be undone, so it permutes the pairs. What falls outside range(size)
    walks on along its cycle until it is inside (Black and Rogaway 2002); fewer than a of a·b numbers are outside.
    """
    a = math.isqrt(max(size - 1, 0)) + 1
    b = math.ceil(size / a)
    values = _feistel(values, a, b, key)
    while bool((outside := values >= size).any()):
        values = torch.where(outside, _feistel(values, a, b, key), values)
    return values


def _feistel(values: Tensor, a: int, b: int, key: int) -> Tensor:
    left, right = values // b, values % b
    for number in range(0, _ROUNDS, 2):
        left = (left + uniform(stream(key, number), right)) % a
        right = (right + uniform(stream(key, number + 1), left)) % b
    return left * b + right


def stream(*keys: int) -> int:
    """Mix integers into the 64-bit key of a random stream, as a signed integer."""
    state = 0
    for key in keys:
        state = _mix_integer((state + key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _BITS)
    return _signed(state)


def hash64(key: int, counters: Tensor) -> Tensor:
    """Random int64, all 64 bits, one for each counter: SplitMix64 (Steele, Lea and Flood 2014) from any counter on."""
    state = (counters + 1) * _signed(0x9E3779B97F4A7C15)
    state += key
    state ^= _shift(state, 30)
    state *= _signed(0xBF58476D1CE4E5B9)
    state ^= _shift(state, 27)
    state *= _signed(0x94D049BB133111EB)
    state ^= _shift(state, 31)
    return state


def uniform(key: int, counters: Tensor) -> Tensor:
    """Random int64 in [0, 2^62), one for each counter: so small that a caller may add to it without overflow."""
    return _shift(hash64(key, counters), 2)


def in_share(random: Tensor, share: float) -> Tensor:
    """Which random numbers of `uniform` fall into the lowest `share` of their range: none at 0, all at 1, nested between."""
    return random < int(share * 2**62)


def _mix_integer(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _BITS
    return state ^ (state >> 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's own carries the sign along."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
