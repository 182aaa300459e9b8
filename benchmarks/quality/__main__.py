"""Every model on MovieLens 1M, warm, for cold items and for cold users, over several seeds, beside published figures.

    python -m benchmarks.quality --data DIR [--work DIR] [--jobs N] [--only PATTERN ...] [--record]
    python -m benchmarks.quality --show

DIR holds what the recipe `ml-1m` reads. Datasets and runs go to the work folder; what is there already is not made again,
so an interrupted benchmark continues. `--record` adds the results to those in this folder, `results.json` and, as tables,
`results.md`; `--show` prints them.
"""

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from benchmarks.experiment import Experiment, Laboratory
from benchmarks.quality.entries import ENTRIES, SPLITS
from benchmarks.quality.table import BEST, markdown, show
from sibra_dist.data.storage import write_atomically

RECORDED = Path(__file__).parent / "results.json"


def main() -> None:
    """Run what has not been run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-ml-1m"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each in a process with one thread")
    parser.add_argument("--only", nargs="+", default=["*"], help="rows, by patterns such as 'MF, *' or '*, warm'")
    parser.add_argument("--record", action="store_true", help="add the results to the recorded ones")
    parser.add_argument("--show", action="store_true", help="print the recorded results, and run nothing")
    arguments = parser.parse_args()
    recorded: dict[str, list[dict[str, Any]]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if arguments.show:
        show(recorded)
        return
    wanted = {
        f"{name}, {setting}": [Experiment(split.protocol, seed, *_started(entry.runs[setting])) for seed in split.seeds]
        for setting, split in SPLITS.items()
        for name, entry in ENTRIES.items()
        if setting in entry.runs
    }
    chosen = {name: made for name, made in wanted.items() if any(fnmatch(name, pattern) for pattern in arguments.only)}
    laboratory = Laboratory(arguments.data, arguments.work)
    results = laboratory.run_all(chosen, arguments.jobs)
    for name, made in results.items():
        for result in made:
            result |= _against_best(laboratory, name, result["seed"])
    if arguments.record:
        recorded |= results
        write_atomically(RECORDED, json.dumps(recorded, indent=1).encode() + b"\n")
        write_atomically(RECORDED.with_suffix(".md"), markdown(recorded).encode())
    show(results)


def _against_best(laboratory: Laboratory, name: str, seed: int) -> dict[str, float]:
    """`p_users`: that a row is not behind the best SiBraR in recall@10, by a paired, one-sided t-test over users."""
    model, _, setting = name.rpartition(", ")
    best = f"{BEST}, {setting}"
    if model == BEST or not (laboratory.folder(best, seed) / "measured.json").exists():
        return {}
    pair = [laboratory.recall_by_user(which, seed) for which in (best, name)]
    return {"p_users": float(ttest_rel(*pair, alternative="greater").pvalue)}


def _started(run: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    return run[0], run[1:]


if __name__ == "__main__":
    main()
