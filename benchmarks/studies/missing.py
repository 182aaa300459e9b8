"""How good is SiBraR in item cold start when a share of the items lacks a modality?"""

from benchmarks.experiment import Experiment, Laboratory
from benchmarks.quality.entries import ENTRIES
from benchmarks.studies.answer import Answer, spread, values

MODALITY = "items.genres"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1, 2)
METRIC = "recall@10"


def study(laboratory: Laboratory, jobs: int) -> Answer:
    """Hide the modality from the same items, in training, at inference, or both."""
    recipe, *settings = ENTRIES["SiBraR, one modality"].runs["cold items"]
    experiments = {}
    for share in SHARES:
        # Without anything hidden in training, each share at inference alone; else nothing, or the same share.
        inference = SHARES if share == 0 else (0.0, share)
        experiments[f"missing {share}"] = [
            Experiment(
                "cold_item",
                seed,
                recipe,
                (*settings, f"training.hide={{{MODALITY}: {share}}}"),
                {f"hidden {other}": {MODALITY: other} for other in inference},
            )
            for seed in SEEDS
        ]
    results = laboratory.run_all(experiments, jobs)
    curves = {
        "training": [values(results[f"missing {share}"], METRIC, "hidden 0.0") for share in SHARES],
        "inference": [values(results["missing 0.0"], METRIC, f"hidden {share}") for share in SHARES],
        "both": [values(results[f"missing {share}"], METRIC, f"hidden {share}") for share in SHARES],
    }
    rows = {f"{share:.0%}": [spread(points[place]) for points in curves.values()] for place, share in enumerate(SHARES)}
    title = f"SiBraR (one modality drawn) for cold items, where a share of the items lacks {MODALITY}"
    return Answer(title, ["share", *curves], rows, f"test {METRIC}", SHARES, curves, "share of the items that lack it")
