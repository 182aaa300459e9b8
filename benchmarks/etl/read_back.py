"""From a prepared dataset to the first training batch, in a process of its own.

python -m benchmarks.etl.read_back DATASET CACHE RESULT
"""

import sys
from pathlib import Path

from benchmarks.etl.measuring import Stopwatch, field, write_result
from sibra_dist.data.batches import Batches
from sibra_dist.data.dataset import open_dataset
from sibra_dist.models import build_model
from sibra_dist.training.config import TrainConfig


def main() -> None:
    """Open the dataset, build the model whose modalities the batches draw, and make the first batch."""
    path, cache, result = map(Path, sys.argv[1:])
    config = TrainConfig.model_validate({"dataset": str(path), "model": {"type": "single_branch"}})
    memory = {"imports": _memory()}
    stopwatch = Stopwatch()
    stopwatch("open")
    dataset = open_dataset(path, cache)
    memory["open"] = _memory()
    stopwatch("model")
    model = build_model(config.model, dataset, config.seed)
    memory["model"] = _memory()
    stopwatch("batch")
    training = config.training
    batches = Batches(
        dataset, *model.sampling(), seed=config.seed, batch_size=training.batch_size, negatives=training.negatives
    )
    batch = batches.batch(epoch=0, step=0)
    stages = stopwatch.stop()
    memory["batch"] = _memory()
    write_result(result, {"stages": stages, "memory": memory, "positives": len(batch.users)})


def _memory() -> dict[str, float]:
    """MiB of this process: its own pages, the mapped pages of files that are in memory, and the peak of both together."""
    status = Path("/proc/self/status").read_text()
    return {name: field(status, kind) / 1024 for name, kind in (("own", "RssAnon"), ("mapped", "RssFile"), ("peak", "VmHWM"))}


if __name__ == "__main__":
    main()
