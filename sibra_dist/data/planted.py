"""The planted structure of synthetic data: who interacts with what, and which features tell of it.

Items belong to groups, each with a popularity of its own by rank. A user takes three fifths of the items from one group, a
quarter from a second one and the rest from a third. So histories and features that tell of groups tell what is liked, of
items too that nobody has interacted with yet.

Nothing here hangs on more than the arguments: random words come from Philox, a counter-based generator (Salmon et al. 2011),
and what is made of them is arithmetic that IEEE 754 rounds alike everywhere. Nothing grows with the interactions either.
"""

import numpy as np
import numpy.typing as npt

from sibra_dist.errors import ConfigError

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

SMALLEST_GROUP = 25
MOST_GROUPS = 32
FEWEST = 3
"""Interactions of a user: one for each split, and one from each group."""
FLATTENED = 0.05
"""How much of the popularity curve is a straight line, so that the most popular items are not everyone's."""
HEAVIEST = 400
"""The square of how much more active the most active users are than the least active."""

# Streams of random words: one for each purpose.
ACTIVITY, TASTE, CHOICE, TURN, ORDER, COLD, FEATURES = range(7)


def words(seed: int, stream: int, first: int, count: int) -> Words:
    """Words number `first` and following of a stream of random words of 64 bits."""
    # Philox makes four words of every value of its counter.
    skipped = first % 4
    random: Words = np.random.Philox(key=[seed, stream], counter=first // 4).random_raw(skipped + count)[skipped:]
    return random


class Structure:
    """What is planted: groups, popularities, tastes."""

    def __init__(self, users: int, items: int, interactions: int, seed: int) -> None:
        """Lay out the groups, and how many interactions each user has.

        Raises:
            ConfigError: there are too few or too many interactions.
        """
        self.users, self.items, self._seed = users, items, seed
        # A user's share of a group is a quarter of it on average, so that active users find enough in it.
        spacious = items * users * 5 // (3 * 4 * interactions)
        self.groups = max(FEWEST, min(MOST_GROUPS, users // SMALLEST_GROUP, items // SMALLEST_GROUP, spacious))
        order = np.argsort(words(seed, ORDER, 0, items), kind="stable")
        self._starts = np.arange(self.groups + 1) * items // self.groups
        self._order = order.astype(np.int32)
        """Items by group, and within a group the most popular first"""
        self.group_of_item = np.empty(items, np.int8)
        self.group_of_item[order] = np.repeat(np.arange(self.groups), np.diff(self._starts))
        self.ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._activities(interactions), dtype=np.int64)])
        """int64 [users + 1]: user u has the interactions number ends[u] to ends[u + 1]"""

    def tastes(self, first: int, last: int) -> Integers:
        """The three groups of each user, most liked first: [users, 3]."""
        random = words(self._seed, TASTE, first, last - first)
        one = random % np.uint64(self.groups)
        two = (one + 1 + (random >> np.uint64(16)) % np.uint64(self.groups - 1)) % np.uint64(self.groups)
        three = (random >> np.uint64(32)) % np.uint64(self.groups - 2)
        three += three >= np.minimum(one, two)
        three += three >= np.maximum(one, two)
        return np.stack([one, two, three], axis=1).astype(np.int64)

    def chosen(self, first: int, last: int) -> tuple[Integers, Integers]:
        """What users take: item int64 [n], by user, and which of the user's slots, int64 [n], each has.

        The ranks of a group are cut into as many stretches as the user takes items of it, short ones at the popular end, and
        one item is drawn from each: no item twice, and no draw in vain.
        """
        degrees = np.diff(self.ends[first : last + 1])
        second, third = degrees // 4, degrees * 3 // 20
        counts = np.stack([degrees - second - third, second, third], axis=1).ravel()
        groups = self.tastes(first, last).ravel()
        sizes = np.diff(self._starts)[groups]
        ends = np.cumsum(counts)
        total = int(ends[-1])
        within = np.arange(total) - np.repeat(ends - counts, counts)
        share = within / np.repeat(counts, counts)
        curve = share * (FLATTENED + (1 - FLATTENED) * share * share)
        low = within + (np.repeat(sizes - counts, counts) * curve).astype(np.int64)
        high = np.append(low[1:], 0)
        high[ends[counts > 0] - 1] = sizes[counts > 0]
        random = (words(self._seed, CHOICE, int(self.ends[first]), total) >> np.uint64(32)).astype(np.int64)
        ranks = low + (random * (high - low) >> 32)
        items = self._order[np.repeat(self._starts[groups], counts) + ranks].astype(np.int64)
        # Slots follow popularity, and start anywhere, so that no split has the popular ones.
        turns = (words(self._seed, TURN, first, last - first) >> np.uint64(1)).astype(np.int64) % degrees
        slots = np.arange(total) - np.repeat(self.ends[first:last] - self.ends[first] - turns, degrees)
        return items, slots % np.repeat(degrees, degrees)

    def _activities(self, interactions: int) -> Integers:
        """How many interactions each user has: a power law, clipped to what the groups hold; their sum is `interactions`."""
        smallest = int(np.diff(self._starts).min())
        most = (smallest - 2) * 5 // 3
        low, high = FEWEST * self.users, most * self.users
        if not low <= interactions <= high:
            raise ConfigError(
                f"synthesize: interactions: {self.users} users and {self.items} items can have from {low} to {high}, "
                f"not {interactions}"
            )
        random = (words(self._seed, ACTIVITY, 0, self.users) >> np.uint64(11)).astype(np.float64) / 2**53
        weights = (1024 / np.sqrt(1 / HEAVIEST + random * (1 - 1 / HEAVIEST))).astype(np.int64)

        def scaled(factor: int) -> Integers:
            clipped: Integers = np.clip(weights * factor >> 20, FEWEST, most)
            return clipped

        # In whole numbers, so that every sum is exact: the largest factor that does not give too many.
        low, high = 0, 1 << 40
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if scaled(middle).sum() <= interactions else (low, middle)
        degrees = scaled(low)
        spare = np.flatnonzero(degrees < most)[: interactions - int(degrees.sum())]
        degrees[spare] += 1
        return degrees


def spread(slots: Integers, counts: Integers | int, of: Integers | int) -> npt.NDArray[np.bool_]:
    """Whether each slot is among `counts` of the slots 0 to `of` - 1, spread evenly: just so many are."""
    return np.asarray(slots * counts % of < counts)


def noise(random: Words) -> npt.NDArray[np.float32]:
    """Four numbers in [-1, 1) of each word."""
    return (random.view(np.uint16).astype(np.float32) - 2**15) / np.float32(2**15)
