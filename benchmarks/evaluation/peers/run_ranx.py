"""ranx, on lists that torch selects.

    python -m benchmarks.evaluation.peers.run_ranx --result FILE WHAT TASK USERS

WHAT is `six` or `ten` metrics, of arrays of numbers, which is what ranx makes of everything it is given; or `six-named`, of its
`Qrels` and `Run`, which are made of dictionaries by name. Making what it is given is part of it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import set_num_threads
from numba.typed import List
from ranx import Qrels, Run, evaluate

from benchmarks.contender import tell
from benchmarks.evaluation.task import LONGEST, Clock, Floats, Integers, Task, at, parse, told

SIX = ("ndcg", "recall", "precision", "hit_rate", "mrr", "map")
METRICS = {"six": SIX, "six-named": SIX, "ten": (*SIX, "f1", "hits", "r-precision", "bpref")}


def lists(task: Task, clock: Clock) -> tuple[Integers, Floats]:
    """The best items of every user and their scores, [U, LONGEST] each."""
    users, items = torch.from_numpy(task.users), torch.from_numpy(task.items)
    best, scores = np.empty((len(users), LONGEST), np.int64), np.empty((len(users), LONGEST), np.float32)
    for rows, _, _ in task.tiles():
        with clock.scoring():
            tile = users[rows] @ items.T
        values, columns = torch.topk(tile, LONGEST, dim=1)
        scores[rows], best[rows] = values.numpy(), columns.numpy()
    return best, scores


def of_numbers(task: Task, best: Integers, scores: Floats) -> tuple[object, object]:
    """What is relevant and what was found, as arrays of pairs (item, relevance or score)."""
    pairs = np.stack([task.relevant, np.ones_like(task.relevant)], axis=1).astype(np.float64)
    relevant = List(np.split(pairs, task.offsets[1:-1]))
    return relevant, np.stack([best.astype(np.float64), scores], axis=2)


def of_names(task: Task, best: Integers, scores: Floats) -> tuple[object, object]:
    """The same as ranx' own structures, by name."""
    each = range(len(best))
    wanted = np.split(task.relevant, task.offsets[1:-1])
    relevant = {f"u{user}": dict.fromkeys((f"i{item}" for item in wanted[user].tolist()), 1) for user in each}
    found = {
        f"u{user}": {f"i{item}": score for item, score in zip(best[user].tolist(), scores[user].tolist(), strict=True)}
        for user in each
    }
    return Qrels(relevant), Run(found)


def run(task: Task, what: str, names: Sequence[str]) -> tuple[Clock, dict[str, float]]:
    """Evaluate the first so many."""
    clock = Clock()
    give = of_names if what == "six-named" else of_numbers
    found = evaluate(*give(task, *lists(task, clock)), names, threads=1)
    return clock, found


def main() -> None:
    """Evaluate with compiled code that is warm."""
    arguments, task = parse(__doc__, *METRICS)
    names = [name for name in at(METRICS[arguments.what]) if not name.startswith(("r-precision", "bpref"))]
    names += [name for name in ("r-precision", "bpref") if name in METRICS[arguments.what]]  # these have no cutoff
    set_num_threads(1)
    run(task.first(20), arguments.what, names)
    clock, found = run(task, arguments.what, names)
    tell(arguments.result, told(arguments, clock.result(len(task.users)), found))


if __name__ == "__main__":
    main()
