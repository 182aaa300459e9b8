"""How training scales, on synthetic datasets of growing sizes, and what a large one would take.

    python -m benchmarks.scale [--sizes 10_000x2_000x500_000 ...] [--folder DIR] [--record]

For each size: synthesize a dataset, open it with an empty cache, train SiBraR for a few steps of small and of large batches
and evaluate it once, and compare the memory that this takes with what `sibra-dist estimate` says of the manifest. Each is a
process of its own with one thread; seconds are of processor time. What has a result in the folder is not measured
again, so that an interrupted benchmark goes on.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import sibra_dist
from benchmarks.scale.report import PAPER, report
from sibra_dist.config import load_config
from sibra_dist.data.cache import cache_folder
from sibra_dist.data.manifest import Manifest
from sibra_dist.estimate import estimate
from sibra_dist.training.config import TrainConfig

SIZES = ("10_000x2_000x500_000", "100_000x20_000x5_000_000", "1_000_000x200_000x50_000_000")
BATCHES = (1024, 8192)
RECIPE = "sibrar-cold-item"
SETTINGS = ("training.device=cpu", "model.users.input_size=64", "model.items.input_size=64", "evaluation.metrics=[ndcg]")
STEPS = 4
"""The first of them is left out: it makes the optimizer's state."""
EVALUATED_USERS = 256
RESULTS = Path(__file__).with_name("results.md")


def settings(dataset: Path | str, batch: int) -> list[str]:
    """What is trained; and of the results, what is estimated."""
    return [f"dataset={dataset}", *SETTINGS, f"training.batch_size={batch}", f"training.evaluate_every_steps={STEPS}"]


def measure(size: str, folder: Path) -> dict[str, Any]:
    """Everything about one size."""
    users, items, interactions = (int(number) for number in size.split("x"))
    dataset, cache, log = folder / "dataset", folder / "cache", folder / "log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = ("--users", f"{users}", "--items", f"{items}", "--interactions", f"{interactions}")
    made = sibra_dist("synthesize", *sizes, "--evaluated-users", f"{EVALUATED_USERS}", "--to", f"{dataset}", log=log)
    os.environ["SIBRA_CACHE"] = str(cache)
    opened = sibra_dist("describe", f"{dataset}", log=log)
    manifest = Manifest.read(dataset)
    found: dict[str, Any] = {
        "users": users,
        "items": items,
        "interactions": interactions,
        "train": manifest.counts.train,
        "synthesize_seconds": made.processor_seconds,
        "synthesize_mebibytes": made.peak_rss_mebibytes,
        "open_seconds": opened.processor_seconds,
        "open_mebibytes": opened.peak_rss_mebibytes,
        "tables": {table: sum(shard.bytes for shard in shards) for table, shards in manifest.shards.items()},
        "cache_bytes": sum(path.stat().st_size for path in cache_folder(manifest, cache).iterdir()),
        "training": {},
    }
    for batch in BATCHES:
        if manifest.counts.train > STEPS * batch:
            found["training"][str(batch)] = trained(dataset, batch, folder)
    return found


def trained(dataset: Path, batch: int, folder: Path) -> dict[str, Any]:
    """A few steps and an evaluation, and what was estimated of them."""
    result = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.scale.trained", str(result), RECIPE, *settings(dataset, batch), "once=true"]
    with (folder / "log").open("ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    told: dict[str, Any] = json.loads(result.read_text())
    rank = estimate(load_config(TrainConfig, RECIPE, settings(dataset, batch))).rank
    seconds = median(told.pop("step_seconds")[1:])
    return told | {
        "seconds_a_step": seconds,
        "parameters": rank.parameters,
        "estimated": rank.private,
        "estimated_mapped": rank.mapped,
    }


def main() -> None:
    """Measure what has not been measured yet, and tell it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="USERSxITEMSxINTERACTIONS")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-scale"))
    parser.add_argument("--keep", action="store_true", help="keep datasets and caches")
    parser.add_argument("--record", action="store_true", help=f"write the tables to {RESULTS.name} beside this file")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    for size in arguments.sizes:
        if size not in results:
            results[size] = measure(size, folder / size)
            kept.write_text(json.dumps(results, indent=2))
            if not arguments.keep:
                shutil.rmtree(folder / size)
    shown = [results[size] for size in arguments.sizes]
    text = report(shown, lambda batch: load_config(TrainConfig, RECIPE, settings(PAPER, batch)))
    machine = f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = f"# Results of `python -m benchmarks.scale`\n\nOn {machine}.\n\n{text}"
    if arguments.record:
        RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
