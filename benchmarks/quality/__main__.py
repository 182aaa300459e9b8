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
    if not chosen:
        parser.error(f"no row is like {' or '.join(arguments.only)}; there are {'; '.join(wanted)}")
    laboratory = Laboratory(arguments.data, arguments.work)
    results = recorded | laboratory.run_all(chosen, arguments.jobs)
    compare(laboratory, results)
    if arguments.record:
        write_atomically(RECORDED, json.dumps(results, indent=1).encode() + b"\n")
        write_atomically(RECORDED.with_suffix(".md"), markdown(results).encode())
        show(results)
    else:
        show({name: results[name] for name in chosen})


def compare(laboratory: Laboratory, results: dict[str, list[dict[str, Any]]]) -> None:
    """Add to all results what takes values of single users, if the runs are in the work folder; else nothing is left of it.

    `map_over_relevant@10`: the mean of AP@10 over all relevant items. `p_users`: that a run is not behind that of the best
    SiBraR in recall@10, by a paired, one-sided t-test over users.
    """
    for name, made in results.items():
        model, _, setting = name.rpartition(", ")
        best = f"{BEST}, {setting}"
        for result in made:
            for key in ("map_over_relevant@10", "p_users"):
                result.pop(key, None)
            if not _is_there(laboratory, name, result):
                continue
            mine = laboratory.by_user(name, result["seed"])
            result["map_over_relevant@10"] = float(mine.average_precision.mean())
            others = [other for other in results.get(best, []) if other["seed"] == result["seed"]]
            if model != BEST and others and _is_there(laboratory, best, others[0]):
                pair = laboratory.by_user(best, result["seed"]).recall, mine.recall
                result["p_users"] = float(ttest_rel(*pair, alternative="greater").pvalue)


def _is_there(laboratory: Laboratory, name: str, result: dict[str, Any]) -> bool:
    """Whether the run that gave a result is in the work folder."""
    measured = laboratory.folder(name, result["seed"]) / "measured.json"
    if not measured.exists():
        return False
    kept = json.loads(measured.read_text())
    return all(kept[key] == result[key] for key in ("recipe", "settings", "evaluations", "commit"))


def _started(run: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    return run[0], run[1:]


if __name__ == "__main__":
    main()
