"""Each relevant candidate against each irrelevant one, tile by tile: what the area under the ROC curve counts.

Two passes over the scores, of which the first is the ranking's own: it notes the scores of the relevant candidates, and the
second looks up, among these, every candidate's score. Counts are integers, so any tiling of the same scores gives the same.
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
    there is but one. Memory: two tiles, an integer for each score of one, and for each user as many scores as anyone has
    relevant candidates.

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
    num_relevant = torch.bincount(rows, minlength=relevant.num_rows)
    ascending = _ascending(own, rows, num_relevant)
    num_ranked, twice_lost = torch.zeros_like(num_relevant), torch.zeros_like(num_relevant)
    for start in range(0, num_candidates, tile_size):
        scores = scored(start, min(start + tile_size, num_candidates)).float().contiguous()
        num_ranked += (scores > MASKED).sum(dim=1)
        # The user's own scores below each score, and once more with those that tie; no score is below a masked one.
        for up_to in (False, True):
            below = torch.searchsorted(ascending, scores, right=up_to, out_int32=True)
            twice_lost += below.clamp_(max=num_relevant[:, None]).sum(dim=1)
    # Among themselves, and with themselves, the relevant ones win half of all pairs.
    twice_won = 2 * num_relevant * num_ranked - twice_lost - num_relevant**2
    return recommended, Comparisons(relevant.lengths() * (num_ranked - num_relevant), twice_won)


def _ascending(own: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """The scores of each row in ascending order, float32 [U, R], and then infinity; rows are ascending, `counts` of each."""
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    padded = own.new_full((len(counts), int(counts.max()) if len(counts) else 0), torch.inf)
    padded[rows, places] = own
    return padded.sort(dim=1).values
