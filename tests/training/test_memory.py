"""Peaks of memory are told, and a dataset that is larger than a rank's memory trains."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.synthetic import SyntheticConfig, synthesize
from sibra_dist.training.loop import Trainer
from sibra_dist.training.memory import STATUS, highest, memory, peak_memory
from sibra_dist.training.placement import size_of
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config

linux = pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell private memory from mapped files")
ALLOWED = 160 << 20
"""Bytes of private memory that training may take besides what the process has when the dataset is open."""
BOUNDED = """
import json, resource, sys
from pathlib import Path

from sibra_dist.config import validate
from sibra_dist.data.dataset import open_dataset
import sibra_dist.evaluation.item_groups, sibra_dist.evaluation.tallies  # before memory is limited: what evaluates needs them
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.placement import size_of
from sibra_dist.training.run_folder import RunFolder

values, folder, allowed = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = validate(TrainConfig, values, "test")
dataset = open_dataset(config.dataset)
run = RunFolder(folder)
run.create(config, dataset)
# The system counts what is mapped for writing, as arrays are whose pages are this process's own once it writes to them.
counted = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (counted * 1024 + allowed,) * 2)
if sys.argv[4:] == ["copy"]:
    copied = [feature.values.clone() for feature in dataset.items.features.values()]
Trainer(config, dataset, run).fit()
print(size_of(dataset))
"""


@linux
def test_private_memory_and_mapped_files_are_told_apart(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    before = memory()
    mapped = np.memmap(tmp_path / "file", np.uint8, mode="r")
    assert mapped.sum() == 0
    with_file = memory()
    assert 0.9 * size < with_file.mapped - before.mapped < 1.1 * size
    assert with_file.private - before.private < 0.1 * size
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not of the heap, which may have as much to give
    np.frombuffer(made, np.uint8)[:] = 1
    assert 0.9 * size < memory().private - with_file.private < 1.1 * size
    assert memory().peak >= before.private + len(made)
    assert peak_memory(torch.device("cpu")) == {"peak_rss_mebibytes": memory().peak >> 20}


def test_the_highest_peak_of_all_ranks_counts() -> None:
    peaks = [{"peak_rss_mebibytes": 5, "peak_gpu_mebibytes": 1}, {"peak_rss_mebibytes": 3, "peak_gpu_mebibytes": 8}]
    assert highest(peaks) == {"peak_rss_mebibytes": 5, "peak_gpu_mebibytes": 8}


def test_a_run_records_its_peak(planted: Path, tmp_path: Path) -> None:
    config, dataset = make_config(planted, training__epochs=1), open_dataset(planted)
    run = RunFolder(tmp_path / "run")
    run.create(config, dataset)
    Trainer(config, dataset, run).fit()
    (line,) = run.metrics()
    assert 50 < line["memory"]["peak_rss_mebibytes"] <= memory().peak >> 20


@linux
@pytest.mark.slow
@pytest.mark.parametrize("copies", [False, True])
def test_a_dataset_larger_than_memory_trains(tmp_path: Path, copies: bool) -> None:
    """Vectors of 512 MiB, of which a process that may have 160 MiB more reads what a step needs; copied, they do not fit."""
    sizes = SyntheticConfig(
        users=500,
        items=262_144,
        interactions=2_000,
        evaluated_users=20,
        user_features=(),
        item_features=("category", "vector"),
        vector_size=512,
        vector_type="float16",
    )
    synthesize(sizes, tmp_path / "dataset")
    side = {"input_size": 16, "hidden_sizes": [16]}
    values = {
        "dataset": str(tmp_path / "dataset"),
        "model": {
            "type": "single_branch",
            "embedding_size": 8,
            "users": {**side, "encoders": {"interactions": {"max_history": 50}}},
            "items": {**side, "modalities": ["category", "vector"]},
        },
        "training": {"epochs": 1, "batch_size": 512, "negatives": 4, "device": "cpu"},
        "evaluation": {"user_tile": 16, "metrics": ["ndcg"], "cutoffs": [10]},
    }
    arguments = [json.dumps(values), str(tmp_path / "run"), str(ALLOWED), *(["copy"] if copies else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "SIBRA_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, "-c", BOUNDED, *arguments], capture_output=True, text=True, env=environment)
    if copies:
        assert ended.returncode != 0
        assert "memory" in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
        assert int(ended.stdout) > 3 * ALLOWED
        assert size_of(open_dataset(tmp_path / "dataset", tmp_path / "cache")) == int(ended.stdout)
        assert len(RunFolder(tmp_path / "run").metrics()) == 1
