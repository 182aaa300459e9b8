"""RecBole's collector and evaluator.

    python -m benchmarks.evaluation.peers.run_recbole --result FILE WHAT TASK USERS

WHAT is `six` metrics, or `auc` beside them, for which RecBole weights users by how much is relevant to them. Runs in RecBole's
environment.
"""

import torch
from recbole.config import Config
from recbole.evaluator import Collector, Evaluator

from benchmarks.contender import tell
from benchmarks.evaluation.task import CUTOFFS, Clock, Task, parse, told

SIX = {"NDCG": "ndcg", "Recall": "recall", "Precision": "precision", "Hit": "hit_rate", "MRR": "mrr", "MAP": "map"}
METRICS = {"six": tuple(SIX), "auc": (*SIX, "GAUC")}


def run(task: Task, config: Config) -> tuple[Clock, dict[str, float]]:
    """Evaluate all users."""
    users, items = torch.from_numpy(task.users), torch.from_numpy(task.items)
    collector, evaluator = Collector(config), Evaluator(config)
    clock = Clock()
    for rows, owners, wanted in task.tiles():
        with clock.scoring():
            scores = users[rows] @ items.T
        collector.eval_batch_collect(scores, None, torch.from_numpy(owners), torch.from_numpy(wanted))
    return clock, evaluator.evaluate(collector.get_data_struct())


def main() -> None:
    """Evaluate, after a user to warm up."""
    arguments, task = parse(__doc__, *METRICS)
    settings = {
        "metrics": list(METRICS[arguments.what]),
        "topk": list(CUTOFFS),
        "metric_decimal_place": 12,
        "eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}, "group_by": "none", "order": "RO", "mode": "full"},
        "use_gpu": False,
        "state": "ERROR",
    }
    config = Config(model="BPR", dataset="none", config_dict=settings)
    run(task.first(1), config)
    clock, found = run(task, config)
    own = {name.lower(): ours for name, ours in SIX.items()}
    named = {name.partition("@"): value for name, value in found.items()}
    metrics = {own.get(name, name) + sign + cutoff: value for (name, sign, cutoff), value in named.items()}
    tell(arguments.result, told(arguments, clock.result(len(task.users)), metrics))


if __name__ == "__main__":
    main()
