"""CoBraR with three losses, and NeuMF with two branches or a shared one: accuracy, what is recommended, and size."""

from benchmarks.experiment import Experiment, Laboratory
from benchmarks.quality.entries import ENTRIES
from benchmarks.studies.answer import Answer, spread, values
from sibra_dist.catalogue import parameter_counts
from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.training.config import TrainConfig

SEEDS = (0, 1, 2)
METRICS = ("recall@10", "ndcg@10", "coverage@10", "gini@10", "arp@10")
MODELS = {
    "CoBraR, bce": ("CoBraR", "training.loss=bce"),
    "CoBraR, bpr": ("CoBraR", "training.loss=bpr"),
    "CoBraR, sampled softmax": ("CoBraR", "training.loss=sampled_softmax"),
    "NeuMF, two branches": ("NeuMF",),
    "NeuMF, single branch": ("NeuMF, single branch",),
}


def study(laboratory: Laboratory, jobs: int) -> Answer:
    """Train each in the warm setting."""
    experiments = {}
    for name, (entry, *changes) in MODELS.items():
        recipe, *settings = ENTRIES[entry].runs["warm"]
        chosen = (*settings, *changes)
        experiments[f"losses {name}"] = [Experiment("random", seed, recipe, chosen) for seed in SEEDS]
    results = laboratory.run_all(experiments, jobs)
    dataset = open_dataset(laboratory.dataset("random", SEEDS[0]))
    rows, bars = {}, []
    for name in MODELS:
        made = results[f"losses {name}"]
        experiment = experiments[f"losses {name}"][0]
        config = load_config(TrainConfig, experiment.recipe, ["dataset=none", *experiment.settings])
        size = sum(parameter_counts(config.model, dataset).values())
        cells = [spread(values(made, metric), 1 if metric.startswith("arp") else 4) for metric in METRICS]
        rows[name] = [*cells, f"{size:,}"]
        bars.append(values(made, "ndcg@10"))
    title = "Losses of CoBraR, and a shared branch in NeuMF, warm"
    return Answer(title, ["model", *METRICS, "parameters"], rows, "test ndcg@10", list(MODELS), {"ndcg@10": bars})
