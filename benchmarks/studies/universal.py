"""One branch for every modality of users and of items, against SiBraR and CoBraR."""

from benchmarks.experiment import Experiment, Laboratory
from benchmarks.quality.entries import ENTRIES, SPLITS
from benchmarks.studies.answer import Answer, spread, values

MODELS = ("universal", "SiBraR, best", "CoBraR")
METRIC = "recall@10"


def study(laboratory: Laboratory, jobs: int) -> Answer:
    """The rows of `benchmarks.quality` of these three: what it made in the same work folder is not made again."""
    experiments = {}
    for name in MODELS:
        for setting, split in SPLITS.items():
            recipe, *settings = ENTRIES[name].runs[setting]
            experiments[f"{name}, {setting}"] = [
                Experiment(split.protocol, seed, recipe, tuple(settings)) for seed in split.seeds
            ]
    results = laboratory.run_all(experiments, jobs)
    curves = {name: [values(results[f"{name}, {setting}"], METRIC) for setting in SPLITS] for name in MODELS}
    rows = {name: [spread(points) for points in curve] for name, curve in curves.items()}
    title = "One branch for everything, a branch a side, or interactions alone"
    return Answer(title, ["model", *SPLITS], rows, f"test {METRIC}", list(SPLITS), curves)
