"""Full ranking in tiles: mask, the top k of a tile, merge with what was found before, and which of it is relevant.

The order is total: higher scores first, and of equal scores the lower candidate first. So the best k of two ranges come
from the best k of each, and any tiling gives the same lists. Nothing here is as large as users x candidates.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr
from sibra_dist.errors import SibraError

NO_CANDIDATE = -1
MASKED = float("-inf")
SHORTEST_GROUP = 4
"""Columns of a group that `_largest` looks at the maximum of; shorter ones are not worth it."""


class NotANumberError(SibraError):
    """A score is NaN: that of candidate number `candidate` for the user in row `row`."""

    def __init__(self, row: int, candidate: int, who: str = "") -> None:
        """Say so of `who`; without it, of the row and the candidate."""
        who = who or f"candidate {candidate} for the user in row {row}"
        super().__init__(
            f"the score of {who} is not a number (NaN); the model has diverged: evaluate an earlier checkpoint, or train "
            "with a lower learning rate"
        )
        self.row, self.candidate = row, candidate


class Recommendations(NamedTuple):
    """The k best candidates of each user, best first."""

    items: Tensor
    """int64 [U, k]: positions in the list of candidates; -1 where fewer than k are left."""
    scores: Tensor
    """float32 [U, k]; -inf where there is no candidate."""


def rank(score_tile: Callable[[int, int], Tensor], num_candidates: int, k: int, tile_size: int) -> Recommendations:
    """The k best of `num_candidates` candidates for each user, holding the scores of `tile_size` candidates at a time.

    `score_tile(start, stop)` gives the scores [U, stop - start] of candidates start to stop, masked ones at -inf. It is
    called in ascending order, and once with (0, 0) where there are no candidates.

    Raises:
        NotANumberError: a score is NaN.
    """
    best = top_k(score_tile(0, min(tile_size, num_candidates)), k)
    for start in range(tile_size, num_candidates, tile_size):
        # What does not surpass the worst of k does not come in: of equal scores the lower candidate, seen before, is better.
        tile = _top_k(score_tile(start, min(start + tile_size, num_candidates)), k, start, best.scores[:, -1:])
        best = merge(best, tile, k)
    return best


def top_k(scores: Tensor, k: int) -> Recommendations:
    """The k best candidates of each row of scores [U, C]; those at -inf are masked and never recommended.

    k may exceed C. Raises:
        NotANumberError: a score is NaN.
    """
    return _top_k(scores, k, start=0, least=scores.new_full((len(scores), 1), MASKED, dtype=torch.float32))


def merge(left: Recommendations, right: Recommendations, k: int) -> Recommendations:
    """The k best of two disjoint ranges of candidates, each given as its own k best; `left` has the lower candidates."""
    items, scores = torch.cat([left.items, right.items], dim=1), torch.cat([left.scores, right.scores], dim=1)
    # Stable, so that of equal scores those of `left` stay first, and each side keeps its own order.
    scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
    return Recommendations(items.gather(1, order)[:, :k], scores[:, :k])


def mask_(scores: Tensor, rows: Tensor, candidates: Tensor, start: int = 0) -> Tensor:
    """Mask, in place, the pairs (rows[p], candidates[p]) that fall in a tile, and return it.

    `scores` [U, T] holds candidates start to start + T; rows and candidates int64 [P] in any order; pairs of other tiles are
    passed over.
    """
    columns = candidates - start
    inside = (columns >= 0) & (columns < scores.shape[1])
    scores[rows[inside], columns[inside]] = MASKED
    return scores


def hits(items: Tensor, relevant: Csr, num_candidates: int) -> Tensor:
    """Whether each recommended candidate is relevant to its user: bool [U, k] for items [U, k] and U rows of `relevant`."""
    users = torch.arange(len(items), device=items.device)
    # One ascending key a pair turns "is it in the user's own list?" into a single search for all users.
    relevant_keys = users.repeat_interleave(relevant.lengths()) * num_candidates + relevant.indices
    keys = users[:, None] * num_candidates + items
    found = torch.searchsorted(relevant_keys, keys, right=True) > torch.searchsorted(relevant_keys, keys)
    # The key of a missing candidate (-1) is that of the last candidate of the user before.
    return found & (items != NO_CANDIDATE)


def _top_k(scores: Tensor, k: int, start: int, least: Tensor) -> Recommendations:
    """`top_k` for the tile whose first column is candidate `start`, of the scores above `least` [U, 1] only."""
    scores = scores.float()
    num_users, num_candidates = scores.shape
    # One more than asked for: it tells whether the last place is contested. NaN counts as the greatest value here.
    values, items = _largest(scores, min(k + 1, num_candidates), least)
    if values.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise NotANumberError(row, start + column)
    values = values.masked_fill(values <= least, MASKED)
    # Distinct scores have but one order. Rows in which some are equal are rare but in models that count (popularity), so only
    # they are looked at again.
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > MASKED)
    contested = tied[:, k - 1 :].any(dim=1).nonzero().squeeze(1)
    values, items = values[:, :k], items[:, :k]
    if len(contested):
        items[contested] = _first_of_equals(scores[contested], values[contested, -1:], k)
    rows = tied.any(dim=1).nonzero().squeeze(1)
    if len(rows):
        ascending = items[rows].sort(dim=1).values
        # Adding 0.0 makes -0.0 equal to 0.0 for sorts that compare bits.
        found = scores[rows[:, None], ascending] + 0.0
        values[rows], order = torch.sort(found, dim=1, descending=True, stable=True)
        items[rows] = ascending.gather(1, order)
    items = (items + start).masked_fill_(values == MASKED, NO_CANDIDATE)
    missing = k - items.shape[1]
    if missing > 0:
        items = torch.cat([items, items.new_full((num_users, missing), NO_CANDIDATE)], dim=1)
        values = torch.cat([values, values.new_full((num_users, missing), MASKED)], dim=1)
    return Recommendations(items, values + 0.0)


def _largest(scores: Tensor, k: int, least: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row, descending, and their columns; any of those that tie for the last place.

    Where they are not above `least` [U, 1] they may be others, and fewer. Long rows are divided into groups of columns. Those
    with the k largest maxima hold the k largest scores: if a group that is left out holds a score, each of the k groups holds
    one that is no smaller. And no group is needed whose maximum is not above the least.
    """
    num_columns = scores.shape[1]
    # Two short selections, among the maxima and in the groups, take least time with about so many columns a group (measured).
    size = math.isqrt(num_columns // (2 * max(k, 1)))
    if size < SHORTEST_GROUP:
        return torch.topk(scores, k, dim=1)
    num_groups = num_columns // size
    # Columns of a group are far apart, so that the maxima are taken of whole rows of groups at once.
    maxima = scores[:, : size * num_groups].unflatten(1, (size, num_groups)).amax(dim=1)
    # Not `maxima > least`: a group with a NaN is looked at.
    needed = min(k, int((~(maxima <= least)).sum(dim=1).max())) if len(scores) else 0
    groups = torch.topk(maxima, needed, dim=1, sorted=False).indices
    steps = torch.arange(0, size * num_groups, num_groups, device=scores.device)
    others = torch.arange(size * num_groups, num_columns, device=scores.device)
    columns = torch.cat([(groups[:, None] + steps[:, None]).flatten(1), others.expand(len(scores), -1)], dim=1)
    values, places = torch.topk(scores.gather(1, columns), min(k, columns.shape[1]), dim=1)
    return values, columns.gather(1, places)


def _first_of_equals(scores: Tensor, least: Tensor, k: int) -> Tensor:
    """The columns [U, k], ascending, of the k best scores, of which the worst is `least` [U, 1]; of its equals the first."""
    above, equal = scores > least, scores == least
    wanted = k - above.sum(dim=1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= wanted))
    return kept.nonzero()[:, 1].view(len(scores), k)
