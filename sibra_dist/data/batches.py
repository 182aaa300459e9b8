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
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr, Dataset

# Streams of random numbers, so that no two purposes share one.
ORDER, NEGATIVES, USER_MODALITIES, ITEM_MODALITIES, NOISE = range(1, 6)

_BITS = (1 << 64) - 1
_ROUNDS = 6


class ModalitySampling(NamedTuple):
    """How a model wants the modalities of one side drawn in training."""

    present: Tensor
    """bool [entities, modalities]"""
    draws: int
    """Distinct modalities drawn for every occurrence of an entity."""


@dataclass(frozen=True)
class TrainBatch:
    """One rank's part of a global batch of B' examples; here B = B' / ranks, padded."""

    users: Tensor
    """int64 [B]"""
    items: Tensor
    """int64 [B, 1+N]: column 0 is the positive, the others are negatives"""
    user_modalities: Tensor
    """int64 [B, draws]: positions in the user side's modalities; their number stands for "none is present" """
    item_modalities: Tensor
    """int64 [B, 1+N, draws], likewise"""
    weights: Tensor
    """float32 [B]: 1, or 0 for padding"""
    total_weight: float
    """Sum of the weights over all ranks: known without communication."""
    noise_key: int
    """Seeds this step's dropout; the same on every rank."""


class Batches:
    """The batches of one rank."""

    def __init__(
        self,
        dataset: Dataset,
        users: ModalitySampling,
        items: ModalitySampling,
        *,
        seed: int,
        batch_size: int,
        negatives: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """Prepare to make batches.

        Args:
            dataset: what to draw from.
            users: how modalities of users are drawn.
            items: how modalities of items are drawn.
            seed: of everything random.
            batch_size: positives in a global batch.
            negatives: negatives for every positive, drawn uniformly with replacement from the training items that the
                user has no training interaction with.
            rank: this rank.
            world: number of ranks.
            device: where batches are made.
        """
        self._device = device or torch.device("cpu")
        self._histories = dataset.users.histories.to(self._device)
        self._negatives = NegativeSampler(self._histories, dataset.training_items.to(self._device), dataset.items.count)
        self._users = ModalitySampling(users.present.to(self._device), users.draws)
        self._items = ModalitySampling(items.present.to(self._device), items.draws)
        self._seed = seed
        self._batch_size = batch_size
        self._num_negatives = negatives
        self._rank = rank
        self._per_rank = math.ceil(batch_size / world)
        self.num_positives = self._histories.nnz
        self.steps_per_epoch = math.ceil(self.num_positives / batch_size)

    @property
    def saturated_users(self) -> int:
        """Users that have interacted with every training item: their negatives are drawn from all of them."""
        return int((self._histories.lengths() >= self._negatives.num_candidates).sum())

    def batch(self, epoch: int, step: int) -> TrainBatch:
        """This rank's part of the global batch of a step."""
        first = step * self._batch_size
        last = min(first + self._batch_size, self.num_positives)
        slots = first + self._rank * self._per_rank + torch.arange(self._per_rank, device=self._device)
        real = slots < last
        # Padding repeats the batch's first example whole, so that it adds no entity to what is encoded.
        places = torch.where(real, slots, first)

        numbers = permute(places, self.num_positives, stream(self._seed, ORDER, epoch))
        users = torch.searchsorted(self._histories.indptr, numbers, right=True) - 1
        positives = self._histories.indices[numbers].long()
        slot = torch.arange(self._num_negatives, device=self._device)
        random = uniform(stream(self._seed, NEGATIVES, epoch), places[:, None] * self._num_negatives + slot)
        items = torch.cat([positives[:, None], self._negatives.sample(users, random)], dim=1)

        column = torch.arange(items.shape[1], device=self._device)
        return TrainBatch(
            users=users,
            items=items,
            user_modalities=draw_modalities(self._users, users, stream(self._seed, USER_MODALITIES, epoch), places),
            item_modalities=draw_modalities(
                self._items, items, stream(self._seed, ITEM_MODALITIES, epoch), places[:, None] * items.shape[1] + column
            ),
            weights=real.float(),
            total_weight=float(last - first),
            noise_key=stream(self._seed, NOISE, epoch, step),
        )


class NegativeSampler:
    """Draws uniformly from the candidates that a user has not interacted with, exactly and without rejection."""

    def __init__(self, histories: Csr, candidates: Tensor, num_items: int) -> None:
        """Prepare to draw.

        Args:
            histories: items of each user, all of them candidates.
            candidates: int64 items, ascending.
            num_items: number of items in all.
        """
        self._histories = histories
        self._candidates = candidates
        is_candidate = torch.zeros(num_items, dtype=torch.int64, device=candidates.device)
        is_candidate[candidates] = 1
        self._rank_of_item = is_candidate.cumsum(0) - 1
        self.num_candidates = candidates.numel()
        longest = int(histories.lengths().max()) if histories.num_rows else 0
        self._halvings = longest.bit_length()

    def sample(self, users: Tensor, random: Tensor) -> Tensor:
        """Items int64 [B, N] for users int64 [B], given random non-negative int64 [B, N].

        The candidates a user has *not* seen are numbered by counting: the j-th seen one (from 0), of rank t_j among the
        candidates, has t_j - j unseen ones before it. So unseen number r has rank r + |{j : t_j - j <= r}|, found by
        bisection. A user who has seen every candidate is given any of them.
        """
        start = self._histories.indptr[users][:, None]
        unseen = self.num_candidates - self._histories.lengths(users)[:, None]
        saturated = unseen <= 0
        number = random % torch.where(saturated, self.num_candidates, unseen)
        low = start.expand_as(number)
        high = self._histories.indptr[users + 1][:, None].expand_as(number)
        for _ in range(self._halvings):
            middle = (low + high) // 2
            open_ = low < high
            rank = self._rank_of_item[self._histories.indices[middle.clamp(max=self._histories.nnz - 1)].long()]
            before = open_ & (rank - (middle - start) <= number)
            low = torch.where(before, middle + 1, low)
            high = torch.where(open_ & ~before, middle, high)
        return self._candidates[torch.where(saturated, number, number + low - start)]


def draw_modalities(sampling: ModalitySampling, entities: Tensor, key: int, counters: Tensor) -> Tensor:
    """Draw distinct modalities uniformly from those present.

    Args:
        sampling: presence [entities, M], and how many to draw.
        entities: int64 [*].
        key: of the random stream.
        counters: int64 [*], one of its own for each occurrence.

    Returns:
        int64 [*, draws]. Where fewer are present the first drawn is repeated; where none is, all are M ("unknown").
    """
    present = sampling.present[entities]
    num_modalities = present.shape[-1]
    modality = torch.arange(num_modalities, device=present.device)
    keys = uniform(key, counters[..., None] * num_modalities + modality)
    keys = torch.where(present, keys, torch.iinfo(torch.int64).max)
    wanted = min(sampling.draws, num_modalities)
    drawn = keys.topk(wanted, dim=-1, largest=False, sorted=True).indices
    drawn = torch.cat([drawn, drawn[..., :1].expand(*drawn.shape[:-1], sampling.draws - wanted)], dim=-1)
    available = present.sum(-1, keepdim=True)
    drawn = torch.where(torch.arange(sampling.draws, device=drawn.device) < available, drawn, drawn[..., :1])
    return torch.where(available > 0, drawn, num_modalities)


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


def _mix_integer(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _BITS
    return state ^ (state >> 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's own carries the sign along."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
