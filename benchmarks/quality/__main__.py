"""Every model on MovieLens 1M, warm, for cold items and for cold users, over several seeds, beside published figures.

    python -m benchmarks.quality --data DIR [--work DIR] [--jobs N] [--only TEXT ...]
    python -m benchmarks.quality --show

DIR holds what the recipe `ml-1m` reads. Datasets and runs go to the work folder; what is there already is not made again,
so an interrupted benchmark continues. Every result is added to the results file when it is there, and the table is made
from that file: `--show` prints the recorded one.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measure import sibra_dist
from benchmarks.quality.entries import ENTRIES, SPLITS, Setting
from benchmarks.quality.table import show
from sibra_dist.data.storage import write_atomically

RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    """Run what has not been run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-quality"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each in a process with one thread")
    parser.add_argument("--only", nargs="+", default=[""], help="models or settings whose names hold one of these texts")
    parser.add_argument("--show", action="store_true", help="print the recorded results, and run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        show(json.loads(RESULTS.read_text()))
        return
    if not (arguments.data / "interactions.tsv").is_file():
        raise SystemExit(f"{arguments.data} holds no MovieLens 1M: name its folder with --data DIR (see the recipe ml-1m)")
    wanted = [
        (setting, seed, name)
        for setting, split in SPLITS.items()
        for seed in split.seeds
        for name, entry in ENTRIES.items()
        if setting in entry.runs and any(text in f"{name}, {setting}" for text in arguments.only)
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    for setting, seed in dict.fromkeys((setting, seed) for setting, seed, _ in wanted):
        prepare(arguments.data, arguments.work, setting, seed)
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(lambda one: run(arguments.work, *one), wanted):
            results[f"{result['setting']}, seed {result['seed']}, {result['model']}"] = result
    path = arguments.work / "results.json"
    write_atomically(path, json.dumps(results, indent=1).encode() + b"\n")
    show(results)
    print(f"\nresults  {path}")


def dataset_of(work: Path, setting: Setting, seed: int) -> Path:
    """Where the dataset of a setting and a seed lies."""
    return work / "datasets" / f"{SPLITS[setting].protocol}-{seed}"


def prepare(data: Path, work: Path, setting: Setting, seed: int) -> None:
    """Make a dataset, unless it is there."""
    dataset = dataset_of(work, setting, seed)
    if not (dataset / "manifest.json").exists():
        split = [f"split.protocol={SPLITS[setting].protocol}", f"split.seed={seed}"]
        sibra_dist(
            "prepare", "ml-1m", f"source={data.resolve()}", *split, "--to", str(dataset), log=dataset.with_suffix(".log")
        )


def run(work: Path, setting: Setting, seed: int, name: str) -> dict[str, Any]:
    """Train and evaluate a model, unless it is done."""
    folder = work / setting.replace(" ", "-") / str(seed) / name.replace(", ", "-").replace(" ", "-")
    done = folder / "measured.json"
    if done.exists():
        kept: dict[str, Any] = json.loads(done.read_text())
        return kept
    log = folder.with_suffix(".log")
    recipe, *settings = ENTRIES[name].runs[setting]
    new = [recipe, f"dataset={dataset_of(work, setting, seed)}", f"seed={seed}", *settings, "--to", str(folder)]
    trained = sibra_dist("train", *(["--resume", str(folder)] if (folder / "config.yaml").exists() else new), log=log)
    evaluated = sibra_dist("evaluate", str(folder), log=log)
    evaluation = json.loads((folder / "evaluation/test/metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "setting": setting,
        "seed": seed,
        "model": name,
        "recipe": [recipe, *settings],
        "commit": json.loads((folder / "environment.json").read_text())["commit"],
        "epoch": evaluation["epoch"],
        "counts": evaluation["counts"],
        "validation": max(line["val/ndcg@10"] for line in lines),
        "test": {metric.removeprefix("test/"): value for metric, value in evaluation["metrics"].items()},
        "train": vars(trained),
        "evaluate": vars(evaluated),
    }
    write_atomically(done, json.dumps(result, indent=1).encode() + b"\n")
    return result


if __name__ == "__main__":
    main()
