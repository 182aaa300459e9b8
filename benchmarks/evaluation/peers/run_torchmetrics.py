"""The retrieval classes of torchmetrics, which share one copy of the scores.

    python -m benchmarks.evaluation.peers.run_torchmetrics --result FILE WHAT TASK USERS

WHAT is `six` or `ten` metrics, of which it has nine, or `auc` beside the six.
"""

import torch
from torchmetrics import MetricCollection, retrieval
from torchmetrics.retrieval.base import RetrievalMetric

from benchmarks.contender import tell
from benchmarks.evaluation.task import CUTOFFS, Clock, Task, parse, told

Classes = dict[str, type[RetrievalMetric]]
SIX: Classes = {
    "ndcg": retrieval.RetrievalNormalizedDCG,
    "recall": retrieval.RetrievalRecall,
    "precision": retrieval.RetrievalPrecision,
    "hit_rate": retrieval.RetrievalHitRate,
    "mrr": retrieval.RetrievalMRR,
    "map": retrieval.RetrievalMAP,
}
METRICS: dict[str, Classes] = {
    "six": SIX,
    "ten": {**SIX, "fall-out": retrieval.RetrievalFallOut, "auroc": retrieval.RetrievalAUROC},
    "auc": SIX,
}


def run(task: Task, what: str) -> tuple[Clock, dict[str, float]]:
    """Evaluate all users."""
    chosen = {f"{name}@{k}": metric(top_k=k) for name, metric in METRICS[what].items() for k in CUTOFFS}
    if what == "ten":
        chosen["r-precision"] = retrieval.RetrievalRPrecision()
    if what == "auc":
        chosen["auc"] = retrieval.RetrievalAUROC()
    users, items = torch.from_numpy(task.users), torch.from_numpy(task.items)
    # All of them have the same states.
    metrics = MetricCollection(dict(chosen), compute_groups=[list(chosen)])
    clock = Clock()
    for rows, owners, wanted in task.tiles():
        with clock.scoring():
            scores = users[rows] @ items.T
        relevant = torch.zeros(scores.shape, dtype=torch.bool)
        relevant[torch.from_numpy(owners), torch.from_numpy(wanted)] = True
        numbers = torch.arange(rows.start, rows.stop)[:, None].expand(scores.shape)
        metrics.update(scores, relevant, indexes=numbers)
    return clock, metrics.compute()


@torch.inference_mode()
def main() -> None:
    """Evaluate, after a user to warm up."""
    arguments, task = parse(__doc__, *METRICS)
    run(task.first(1), arguments.what)
    clock, found = run(task, arguments.what)
    tell(arguments.result, told(arguments, clock.result(len(task.users)), found))


if __name__ == "__main__":
    main()
