"""Ours: tiles of scores to lists, lists to hits, hits to averages.

    python -m benchmarks.evaluation.ours --result FILE WHAT TASK USERS

WHAT is `six`, the metrics that all have; `ten`; `auc`, which is added to the six; or `lists`, which is the best items alone.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.contender import tell
from benchmarks.evaluation.task import CUTOFFS, FEW, LONGEST, SOME, Clock, Task, parse, told
from sibra_dist.data.dataset import Csr
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import rank_and_compare
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.metrics import OVER_ALL_CANDIDATES, at_cutoffs
from sibra_dist.evaluation.ranking import hits, rank
from sibra_dist.evaluation.tallies import UserAverages
from sibra_dist.evaluation.user_metrics import Lists
from sibra_dist.training.placement import keep_freed_memory

SIX = ("ndcg", "recall", "precision", "hit_rate", "mrr", "map")
METRICS: dict[str, tuple[str, ...]] = {"six": SIX, "ten": (*SIX, "f1", "epc", "efd", "aplt"), "auc": (*SIX, "auc")}
ITEM_TILE = EvaluationConfig().item_tile


def evaluate(task: Task, names: tuple[str, ...]) -> tuple[Clock, dict[str, dict[str, float]]]:
    """The averages over all users, and over as many as others evaluate, by their number."""
    averages = UserAverages(at_cutoffs(names, CUTOFFS))
    users, items = torch.from_numpy(task.users), torch.from_numpy(task.items)
    popularity = torch.bincount(torch.from_numpy(task.relevant), minlength=len(items))
    catalog = Catalog.of(popularity, torch.arange(len(items)), len(users))
    compared = any(name in OVER_ALL_CANDIDATES for name in names)
    found = {}
    clock = Clock()
    for rows, owners, wanted in task.tiles():
        with clock.scoring():
            scores = users[rows] @ items.T
        lengths = torch.bincount(torch.from_numpy(owners), minlength=len(scores))
        relevant = Csr(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), torch.from_numpy(wanted).int())
        comparisons = None
        if compared:
            lists, comparisons = rank_and_compare(partial(_tile, scores), relevant, len(items), LONGEST, ITEM_TILE)
        else:
            lists = rank(partial(_tile, scores), len(items), LONGEST, ITEM_TILE)
        listed = Lists(hits(lists.items, relevant, len(items)), lengths, lists.items, catalog, comparisons)
        averages.update(averages.per_user(listed), lengths)
        if rows.stop in (FEW, SOME, len(users)):
            computed = averages.compute()
            found[str(rows.stop)] = {name: computed[name] for name in averages.metrics}
    return clock, found


def best(task: Task) -> tuple[Clock, float]:
    """The best items of every user; their mean score."""
    users, items = torch.from_numpy(task.users), torch.from_numpy(task.items)
    total = torch.zeros((), dtype=torch.float64)
    clock = Clock()
    for rows, _, _ in task.tiles():
        own = users[rows]
        lists = rank(lambda start, stop, own=own: own @ items[start:stop].T, len(items), LONGEST, ITEM_TILE)  # type: ignore[misc]
        total += lists.scores.sum(dtype=torch.float64)
    return clock, total.item() / len(users) / LONGEST


def _tile(scores: Tensor, start: int, stop: int) -> Tensor:
    return scores[:, start:stop]


@torch.inference_mode()
def main() -> None:
    """Evaluate, or list the best."""
    arguments, task = parse(__doc__, *METRICS, "lists")
    keep_freed_memory(torch.device("cpu"))  # as the commands do
    if arguments.what == "lists":
        best(task.first(1))  # warms up
        clock, mean = best(task)
        tell(arguments.result, told(arguments, clock.result(len(task.users)), {"mean score": mean}))
        return
    names = METRICS[arguments.what]
    evaluate(task.first(1), names)
    clock, found = evaluate(task, names)
    result = told(arguments, clock.result(len(task.users)), found[str(len(task.users))])
    tell(arguments.result, result | {"prefixes": found})


if __name__ == "__main__":
    main()
