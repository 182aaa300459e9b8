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
PAIRS = (
    "training.batch_size=16384",
    "training.learning_rate=3.0e-3",
    "training.schedule=cosine",
    "training.epochs=12",
    "training.evaluate_every=3",
    "model.users.input_size=128",
    "model.items.input_size=128",
)
"""Examples are pairs, which all three losses can have; the rows of `benchmarks.quality` are of whole users."""
COBRAR = {
    "CoBraR, bce": "bce",
    "CoBraR, bpr": "bpr",
    "CoBraR, sampled softmax": "sampled_softmax",
}
NEUMF = {"NeuMF, two branches": "NeuMF", "NeuMF, single branch": "NeuMF, single branch"}


def study(laboratory: Laboratory, jobs: int) -> Answer:
    """Train each in the warm setting; what `benchmarks.quality` made in the same work folder is not made again."""
    runs: dict[str, tuple[str, tuple[str, ...]]] = {
        name: (f"losses {name}", ("cobrar", *PAIRS, f"training.loss={loss}")) for name, loss in COBRAR.items()
    }
    runs |= {name: (f"{entry}, warm", ENTRIES[entry].runs["warm"]) for name, entry in NEUMF.items()}
    experiments = {run: [Experiment("random", seed, chosen[0], chosen[1:]) for seed in SEEDS] for run, chosen in runs.values()}
    results = laboratory.run_all(experiments, jobs)
    dataset = open_dataset(laboratory.dataset("random", SEEDS[0]))
    rows, bars = {}, []
    for name, (run, _) in runs.items():
        made, experiment = results[run], experiments[run][0]
        config = load_config(TrainConfig, experiment.recipe, ["dataset=none", *experiment.settings])
        size = sum(parameter_counts(config.model, dataset).values())
        cells = [spread(values(made, metric), 1 if metric.startswith("arp") else 4) for metric in METRICS]
        rows[name] = [*cells, f"{size:,}"]
        bars.append(values(made, "ndcg@10"))
    title = "Losses of CoBraR, and a shared branch in NeuMF, warm"
    return Answer(title, ["model", *METRICS, "parameters"], rows, "test ndcg@10", list(runs), {"ndcg@10": bars})
