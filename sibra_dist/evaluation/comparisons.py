"""Each relevant candidate against each irrelevant one, tile by tile: what the area under the ROC curve counts.

Two passes over the scores, of which the first is the ranking's own: it notes the scores of the relevant candidates, and the
second counts the candidates below them. Counts are integers, so any tiling of the same scores gives the same.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.evaluation.ranking import MASKED, Recommendations, rank


class Comparisons(NamedTuple):
    """Pairs of a relevant and an irrelevant candidate of each of U users, both of them ranked for the user."""

    num_pairs: Tensor
    """int64 [U]"""
    twice_won: Tensor
    """int64 [U]: twice the number of pairs in which the relevant one is scored higher, plus that of pairs that tie"""


def rank_and_compare(
    score_tile: Callable[[int, int], Tensor], relevant: Csr, num_candidates: int, k: int, tile_size: int
) -> tuple[Recommendations, Comparisons]:
    """`rank`, with the comparisons of the relevant candidates, a row each user, with all others.

    A masked candidate is in no pair, but for a relevant one, which then loses all of them. Every tile is scored twice, unless
    there is but one. Memory: two tiles, the second pass's sorted copy, and a few integers for each relevant candidate.

    Raises:
        NotANumberError: a score is NaN.
    """
    rows = torch.repeat_interleave(relevant.lengths())
    candidates = relevant.indices.long()
    own = torch.full(rows.shape, MASKED, device=rows.device)
    scored = lru_cache(maxsize=1)(score_tile)

    def noted(start: int, stop: int) -> Tensor:
        scores = scored(start, stop)
        columns = candidates - start
        inside = (columns >= 0) & (columns < scores.shape[1])
        own[inside] = scores[rows[inside], columns[inside]].float()
        return scores

    recommended = rank(noted, num_candidates, k, tile_size)
    ranked = own > MASKED
    rows, own = rows[ranked], own[ranked]
    twice_won = relevant.lengths().new_zeros(relevant.num_rows)
    num_ranked = torch.zeros_like(twice_won)
    for start in range(0, num_candidates, tile_size):
        ascending = scored(start, min(start + tile_size, num_candidates)).float().sort(dim=1).values
        num_masked = (ascending == MASKED).sum(dim=1)
        num_ranked += ascending.shape[1] - num_masked
        # One ascending key a score turns "how many of the user's own scores are lower?" into a single search for all users.
        users = torch.arange(len(ascending), device=rows.device)
        keys = _keys(ascending, users[:, None]).flatten()
        wanted = _keys(own, rows)
        up_to, below = torch.searchsorted(keys, wanted, right=True), torch.searchsorted(keys, wanted)
        before = rows * ascending.shape[1] + num_masked[rows]
        # Twice those below and once those that tie.
        twice_won.index_add_(0, rows, (up_to - before) + (below - before))
    # Among themselves, and with themselves, the relevant ones win half of all pairs.
    num_relevant = torch.bincount(rows, minlength=relevant.num_rows)
    return recommended, Comparisons(relevant.lengths() * (num_ranked - num_relevant), twice_won - num_relevant**2)


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Integers, int64, in the order of the rows and within a row in the order of the scores, which are float32."""
    # Adding 0.0 makes -0.0 equal to 0.0. The bits of floating-point numbers ascend as integers, but for negative ones.
    bits = (scores + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (rows << 32)
