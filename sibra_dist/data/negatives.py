"""Draws negatives: items that a user has not interacted with, exactly, without rejection, by integer masses.

Every item has a mass, 0 where it is never drawn, and a user's negative is drawn with probability

    mass / (total mass - mass of the items of the user's history)

among the items outside the history. `uniform` gives every training item mass 1, `popularity` a power of its number of
interactions, and `in_batch` as much as it occurs among the positives of the global batch. Masses are integers, so sums of
them are exact, and the probability of each draw is known exactly as well: log-Q correction needs it.
"""

import math
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sibra_dist.config import Config
from sibra_dist.data.dataset import Csr, Dataset

# A popularity is rounded to a multiple of 2^-16 of that of an item with one interaction, or more coarsely where sums would
# otherwise be too large: of all masses, for random numbers below 2^62 to divide evenly to 2^-16; and of those along all
# histories, to fit into 64 bits.
FRACTION_BITS, TOTAL_BITS, PREFIX_BITS = 16, 46, 61


class SamplerConfig(Config):
    """How negatives are drawn: only training items, and none of the user's own unless the user has them all."""

    type: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """`popularity`: in proportion to the number of training interactions to the power of `exponent`; `in_batch`: in
    proportion to how often an item is a positive in the global batch."""
    exponent: Annotated[float, Field(ge=0, le=2)] = 0.75
    """Of `popularity`: 0 is uniform, 1 in proportion to the number of interactions."""
    log_q: bool = False
    """Whether `sampled_softmax` corrects each negative by its own probability of being drawn (Bengio and Senécal 2008)."""
    pool: Annotated[int, Field(ge=1)] | None = None
    """Hard negatives: so many are drawn, and the model trains on the `negatives` that it scores highest."""

    @model_validator(mode="after")
    def _pool_is_without_correction(self) -> Self:
        if self.pool is not None and self.log_q:
            raise ValueError(
                "log_q corrects for how negatives are drawn, and the highest-scored of a pool have no known probability: "
                "set log_q to false, or pool to null"
            )
        return self


UNIFORM = SamplerConfig()


class Negatives(NamedTuple):
    """N negatives of each of B users."""

    items: Tensor
    """int64 [B, N]"""
    log_counts: Tensor
    """float32 [B, N]: log of how many items each stands for"""


class NegativeDraws:
    """Draws the negatives of a dataset's users as a `SamplerConfig` says."""

    def __init__(self, dataset: Dataset, config: SamplerConfig) -> None:
        """Prepare to draw where the dataset's tensors are."""
        self._config = config
        self._histories = dataset.users.histories
        self._num_candidates = len(dataset.training_items)
        uniform = torch.zeros(dataset.items.count, dtype=torch.int64, device=dataset.device)
        uniform[dataset.training_items] = 1
        self._uniform = NegativeSampler(self._histories, uniform, unit=True)
        self._sampler = self._uniform
        if config.type == "popularity":
            # On the CPU, so that ranks on different devices agree on every mass.
            masses = popularity_masses(dataset.items.histories.lengths().cpu(), config.exponent).to(dataset.device)
            self._sampler = NegativeSampler(self._histories, masses * uniform)

    @property
    def saturated_users(self) -> int:
        """Users that have interacted with every training item: their negatives are drawn from all of them."""
        return int((self._histories.lengths() >= self._num_candidates).sum())

    @property
    def reads_batch(self) -> bool:
        """Whether draws depend on the positives of the global batch."""
        return self._config.type == "in_batch"

    def draw(self, users: Tensor, random: Tensor, positives: Tensor | None = None) -> Negatives:
        """Negatives for users int64 [B], given random int64 [B, N] in [0, 2^62).

        `positives` int64 [P], those of the global batch, are read where `reads_batch`.
        """
        sampler, rows = self._sampler, users
        if self.reads_batch:
            assert positives is not None
            sampler, rows = self._of_batch(users, positives)
        items = sampler.sample(rows, random)
        # A batch may hold nothing but what the user knows, which says nothing about other items.
        exhausted = sampler.exhausted(rows)
        falls_back = self.reads_batch and bool(exhausted.any())
        if falls_back:
            items = torch.where(exhausted[:, None], self._uniform.sample(users, random), items)
        num_negatives = random.shape[1]
        if not self._config.log_q:
            counts = torch.full(items.shape, math.log(self._num_candidates / num_negatives), device=items.device)
            return Negatives(items, counts)
        log_q = sampler.log_probability(rows, items)
        if falls_back:
            log_q = torch.where(exhausted[:, None], self._uniform.log_probability(users, items), log_q)
        return Negatives(items, -(log_q + math.log(num_negatives)).float())

    def _of_batch(self, users: Tensor, positives: Tensor) -> tuple["NegativeSampler", Tensor]:
        """A sampler of the batch's positives over the histories of the users in it, and the row there of each user."""
        distinct, rows = torch.unique(users, return_inverse=True)
        indices, starts = self._histories.gather(distinct)
        histories = Csr(torch.cat([starts, starts.new_tensor([indices.numel()])]), indices)
        masses = torch.zeros_like(self._uniform.masses)
        masses.index_add_(0, positives, torch.ones_like(positives))
        return NegativeSampler(histories, masses, longest=self._uniform.longest), rows


class NegativeSampler:
    """Draws items outside a history, each with a probability in proportion to its mass.

    With B(t) the mass of all items before t, and P(j) that of the first j items of the history, the history's item number
    j, t_j, has B(t_j) - P(j) of free mass before it. This does not fall with j, so bisection finds how many of the history
    stand before a number r in [0, free mass); with k of them, r is place r + P(k) among the masses of all items.
    """

    def __init__(self, histories: Csr, masses: Tensor, *, unit: bool = False, longest: int | None = None) -> None:
        """Prepare to draw.

        Args:
            histories: items of each row.
            masses: int64 [items], not negative; one at least is positive.
            unit: whether masses are 0 and 1, and those of all items of histories 1: then sums along histories need not be
                stored.
            longest: number of items in a history, at most, where that is known.
        """
        self._histories = histories
        self.masses = masses
        self._below = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
        self._prefix = self._items = None
        if unit:  # the place among the masses is the place among the items that have one
            self._items = torch.nonzero(masses).flatten()
        else:
            along = masses[histories.indices.long()].cumsum(0)
            self._prefix = torch.cat([along.new_zeros(1), along])
        if longest is None:
            longest = int(histories.lengths().max()) if histories.num_rows else 0
        self.longest = longest

    def exhausted(self, rows: Tensor) -> Tensor:
        """Which rows int64 [B] have nothing outside their history that could be drawn: bool [B]."""
        return self._free(rows) <= 0

    def sample(self, rows: Tensor, random: Tensor) -> Tensor:
        """Items int64 [B, N] for rows int64 [B], given random int64 [B, N] in [0, 2^62).

        A row that is exhausted is given any items, by their masses.
        """
        start = self._histories.indptr[rows][:, None]
        free = self._free(rows)[:, None]
        exhausted = free <= 0
        number = random % torch.where(exhausted, self._below[-1], free)
        low = start.expand_as(number)
        high = self._histories.indptr[rows + 1][:, None].expand_as(number)
        origin = self._along(start)
        for _ in range(self.longest.bit_length()):
            middle = (low + high) >> 1
            open_ = low < high
            item = self._histories.indices[middle.clamp(max=self._histories.nnz - 1)].long()
            before = open_ & (self._below[item] - (self._along(middle) - origin) <= number)
            low = torch.where(before, middle + 1, low)
            high = torch.where(open_ & ~before, middle, high)
        place = torch.where(exhausted, number, number + self._along(low) - origin)
        return torch.searchsorted(self._below[1:], place, right=True) if self._items is None else self._items[place]

    def log_probability(self, rows: Tensor, items: Tensor) -> Tensor:
        """Log of the probability that a draw for rows int64 [B] gives items int64 [B, N], which it can: float64 [B, N]."""
        free = self._free(rows)
        masses = torch.where(free > 0, free, self._below[-1])
        return self.masses[items].double().log() - masses.double().log()[:, None]

    def _free(self, rows: Tensor) -> Tensor:
        start, end = self._histories.indptr[rows], self._histories.indptr[rows + 1]
        return self._below[-1] - (self._along(end) - self._along(start))

    def _along(self, places: Tensor) -> Tensor:
        """The mass of all entries of the histories before some places."""
        return places if self._prefix is None else self._prefix[places]


def popularity_masses(counts: Tensor, exponent: float) -> Tensor:
    """Integer masses int64 [n] in proportion to counts int64 [n] to the power of an exponent, and at least 1."""
    powers = counts.double() ** exponent
    total, along = float(powers.sum()), float((powers * counts).sum())
    fit = [math.floor(bits - math.log2(sum_)) for bits, sum_ in ((TOTAL_BITS, total), (PREFIX_BITS, along)) if sum_ > 0]
    return (powers * 2.0 ** min([FRACTION_BITS, *fit])).round().long().clamp(min=1)
