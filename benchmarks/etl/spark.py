"""The preparation by `sibra_dist.etl`, on Spark in `local[2]` with 6 GiB of driver memory, in a process of its own.

python -m benchmarks.etl.spark SOURCE TO SCRATCH RESULT
"""

import sys
from pathlib import Path

from benchmarks.etl.measuring import Stopwatch, write_result
from benchmarks.etl.task import CORE, FEATURES, INTERACTIONS, MIN_RATING, SEED, TEST, VALIDATION
from sibra_dist.data.manifest import Manifest
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare


def config_of(source: Path, scratch: Path) -> PrepareConfig:
    """The task, as `sibra-dist prepare` is told it; what Spark spills goes to `scratch`."""
    sides = {
        side: [{"path": path, "id": f"{side[:-1]}_id", "features": {name: {"kind": kind} for name, kind in features.items()}}]
        for side, (path, features) in FEATURES.items()
    }
    return PrepareConfig.model_validate(
        {
            "name": "synthetic",
            "source": str(source),
            "interactions": {"path": INTERACTIONS, "rating": "rating", "time": "time"},
            **sides,
            "filters": {"min_rating": MIN_RATING, "duplicates": "latest", "core": CORE},
            "split": {"protocol": "random", "seed": SEED, "validation": VALIDATION, "test": TEST},
            "spark": {"master": "local[2]", "driver_memory": "6g", "settings": {"spark.local.dir": str(scratch)}},
        }
    )


def counts_of(manifest: Manifest) -> dict[str, int]:
    """The numbers of `task.COUNTS`."""
    records = manifest.records
    rejected = sum(records.rejected.values())
    return {"read": records.read, "rejected": rejected, "kept": records.kept, **manifest.counts.model_dump()}


def main() -> None:
    """Prepare as the command line says, and tell how."""
    source, to, scratch, result = map(Path, sys.argv[1:])
    stopwatch = Stopwatch()
    stopwatch("start")
    manifest = prepare(config_of(source, scratch), to, progress=stopwatch)
    write_result(result, {"counts": counts_of(manifest), "stages": stopwatch.stop()})


if __name__ == "__main__":
    main()
