"""SiBraR on MovieLens 1M, warm and in item cold start, beside the published figures.

    python -m benchmarks.ml_1m --data DIR [--work DIR]

DIR holds what the recipe `ml-1m` reads. Datasets and runs go to the work folder; what is there already is not made again,
so an interrupted benchmark continues. The results are printed, and written to `results.json` in the work folder.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import sibra_dist
from sibra_dist.config import load_config
from sibra_dist.training.config import TrainConfig

COLD_SEEDS = (0, 1, 2)
# (protocol, split seed, recipe, settings)
RUNS: list[tuple[str, int, str, tuple[str, ...]]] = [
    *(("cold_item", seed, "sibrar-cold-item", ("training.epochs=3",)) for seed in COLD_SEEDS),
    *(("cold_item", seed, model, ()) for seed in COLD_SEEDS for model in ("pop", "random")),
    *(("random", 0, model, ()) for model in ("sibrar-warm", "pop", "random")),
]
METRICS = ("recall@10", "ndcg@10", "precision@10", "map@10", "coverage@10")
# From the supplement of the SiBraR paper, test split: recall@10. Its draw of cold items cannot be rebuilt.
PUBLISHED = {
    ("cold_item", "sibrar"): 0.1869,
    ("cold_item", "pop"): 0.0032,
    ("random", "sibrar"): 0.1836,
    ("random", "pop"): 0.0798,
}


def main() -> None:
    """Run what has not been run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-ml-1m"))
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.data / "interactions.tsv").is_file():
        raise SystemExit(f"{arguments.data} holds no MovieLens 1M: name its folder with --data DIR (see the recipe ml-1m)")
    results = [_run(arguments, *run) for run in RUNS]
    (arguments.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _show(results)


def _run(arguments: argparse.Namespace, protocol: str, seed: int, model: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """One model on one dataset: prepare it if need be, train, evaluate, with and without interactions of items."""
    name = f"{protocol}-{seed}"
    dataset, run = arguments.work / "datasets" / name, arguments.work / name / model
    done = run / "measured.json"
    if done.exists():
        kept: dict[str, Any] = json.loads(done.read_text())
        return kept
    log = run.with_suffix(".log")
    split = [f"split.protocol={protocol}", f"split.seed={seed}"]
    prepared = sibra_dist("prepare", "ml-1m", f"source={arguments.data.resolve()}", *split, "--to", str(dataset), log=log)
    new = [model, f"dataset={dataset}", *settings, "--to", str(run)]
    start = ["--resume", str(run)] if (run / "config.yaml").exists() else new
    trained = sibra_dist("train", *start, "--workers", str(arguments.workers), log=log)
    evaluated = sibra_dist("evaluate", str(run), log=log)
    result = {
        "protocol": protocol,
        "seed": seed,
        "model": load_config(TrainConfig, run / "config.yaml").model.type,
        "metrics": json.loads((run / "evaluation/test/metrics.json").read_text())["metrics"],
        "best_validation_ndcg@10": max(line["val/ndcg@10"] for line in map(json.loads, (run / "metrics.jsonl").open())),
        "prepare": vars(prepared),
        "train": vars(trained),
        "evaluate": vars(evaluated),
    }
    if result["model"] == "sibrar" and protocol == "random":
        sibra_dist("evaluate", str(run), "--hide", "items.interactions", log=log)
        hidden = json.loads((run / "evaluation/test/metrics-without-items.interactions.json").read_text())
        result["without_items.interactions"] = hidden["metrics"]
    done.write_text(json.dumps(result, indent=2))
    return result


def _show(results: list[dict[str, Any]]) -> None:
    console = Console(width=140, highlight=False)
    table = Table("split", "seed", "model", *METRICS, "published recall@10", "train s", "peak MiB", box=None, pad_edge=False)
    for result in results:
        published = PUBLISHED.get((result["protocol"], result["model"]))
        table.add_row(
            result["protocol"],
            str(result["seed"]),
            result["model"],
            *(f"{result['metrics'][f'test/{name}']:.4f}" for name in METRICS),
            f"{published:.4f}" if published else "",
            f"{result['train']['seconds']:.0f}",
            f"{result['train']['peak_rss_mebibytes']:.0f}",
        )
    console.print(table)
    for model in ("sibrar", "pop", "random"):
        recalls = [r["metrics"]["test/recall@10"] for r in results if (r["protocol"], r["model"]) == ("cold_item", model)]
        mean, deviation = statistics.mean(recalls), statistics.stdev(recalls)
        console.print(
            f"{model}, item cold start: test recall@10 {mean:.4f} (mean of {len(recalls)} draws, deviation {deviation:.4f})"
        )
    for result in results:
        if "without_items.interactions" in result:
            hidden = result["without_items.interactions"]["test/recall@10"]
            console.print(f"{result['model']}: warm, interactions of items hidden, test recall@10 {hidden:.4f}")


if __name__ == "__main__":
    main()
