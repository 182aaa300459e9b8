"""What `sibra-dist estimate` says is what training then takes, and needs no more than a manifest."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sibra_dist.catalogue import packaged_recipes, parameter_counts
from sibra_dist.config import load_config
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.synthetic import SyntheticConfig, synthesize
from sibra_dist.errors import ConfigError
from sibra_dist.estimate import PROCESS_BYTES, Estimate, estimate, read_bytes
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import size_of
from sibra_dist.training.rehearsal import Allocations
from sibra_dist.training.skeleton import array_bytes

SIZES = SyntheticConfig(users=2_000, items=100_000, interactions=6_000, evaluated_users=100)
TOLERANCE = 0.2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of which training takes hundreds of MB in few steps: items are many, and so is the users' table large."""
    folder = tmp_path_factory.mktemp("synthetic") / "dataset"
    synthesize(SIZES, folder)
    return folder


@pytest.fixture(scope="module")
def manifest_only(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    Manifest.read(dataset).write(folder)
    return folder


def config_of(recipe: str, dataset: Path, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, recipe, [f"dataset={dataset}", "training.device=cpu", *overrides])


def estimated(recipe: str, dataset: Path, *overrides: str, **asked: Any) -> Estimate:
    return estimate(config_of(recipe, dataset, *overrides), **asked)


@pytest.mark.parametrize("recipe", packaged_recipes())
def test_every_recipe_can_be_estimated_from_a_manifest_alone(recipe: str, dataset: Path, manifest_only: Path) -> None:
    config = config_of(recipe, manifest_only, "training.batch_size=256")
    rank, of_two = estimate(config).rank, estimate(config, 2).rank
    counted = sum(parameter_counts(config.model, open_dataset(dataset)).values())
    assert rank.gradients <= of_two.gradients == 4 * counted  # one rank alone sums those of histories as it follows them
    assert rank.optimizer == of_two.optimizer == 8 * counted
    assert rank.evaluation > 0
    assert (rank.step > 0) == bool(counted)
    assert rank.gpu is None


def test_activations_grow_with_the_batch_and_shrink_with_ranks_and_parts(manifest_only: Path) -> None:
    def step(batch: int, *overrides: str, workers: int = 1) -> int:
        rank = estimated("sibrar-warm", manifest_only, f"training.batch_size={batch}", *overrides, workers=workers).rank
        return rank.gradients + rank.step

    small, large = step(512), step(4_096)
    assert 5 * small < large < 9 * small
    assert step(4_096, workers=8) == step(1_024, workers=2)
    assert step(4_096, "training.precision=bfloat16") < 0.9 * large
    assert step(4_096, "training.accumulate=8") < large / 2


def test_divided_tables_fit_where_replicated_ones_do_not(manifest_only: Path) -> None:
    found = estimated("sibrar-warm", manifest_only, "training.batch_size=64", workers=2, gpu_bytes=read_bytes("1000MiB"))
    assert found.gpus["replicated"] is None
    assert found.gpus["row_sharded"] in (2, 4, 8)
    assert found.rank.checkpoint == 3 * found.rank.gradients
    assert found.rank.communication >= 4 * 256 * 100_000
    roomy = estimated("sibrar-warm", manifest_only, "training.batch_size=64", gpu_bytes=read_bytes("80GB"))
    assert roomy.gpus == {"replicated": 1, "row_sharded": 1}
    assert roomy.rank.mapped == 0
    assert roomy.rank.gpu is not None
    assert roomy.rank.gpu > roomy.rank.data


def test_what_evaluates_apart_holds_the_whole_model(manifest_only: Path) -> None:
    def rank(*overrides: str) -> Any:
        common = ("training.batch_size=64", "training.interaction_table=row_sharded")
        return estimated("sibrar-warm", manifest_only, *common, *overrides, workers=4).rank

    ranks, apart = rank(), rank("training.evaluate_on=apart")
    assert ranks.validator == apart.evaluation == 0
    whole = estimated("sibrar-warm", manifest_only, "training.batch_size=64").rank.parameters
    assert whole > 3 * apart.parameters
    assert apart.validator == pytest.approx(PROCESS_BYTES + whole + max(whole, ranks.evaluation), rel=1e-4)
    assert apart.training <= ranks.training


def test_lazy_updates_have_gradients_of_what_a_batch_touches(manifest_only: Path) -> None:
    def gradients(batch: int) -> int:
        rank = estimated("sibrar-warm", manifest_only, f"training.batch_size={batch}", "training.table_updates=lazy").rank
        assert rank.optimizer == 2 * estimated("sibrar-warm", manifest_only, workers=2).rank.gradients
        return rank.gradients

    few, many = gradients(64), gradients(1_024)
    assert few < many < estimated("sibrar-warm", manifest_only, workers=2).rank.gradients / 2


def test_bytes_of_the_dataset_are_those_of_its_arrays(dataset: Path) -> None:
    assert sum(array_bytes(Manifest.read(dataset)).values()) == pytest.approx(size_of(open_dataset(dataset)), rel=0.05)


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 << 30), ("80GB", 80 * 10**9), ("512 MiB", 512 << 20), ("1.5g", 1_500_000_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "GiB", "0GiB", "1.2.3GB", "-1GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory"):
        read_bytes(text)


def test_allocations_are_counted_until_they_are_freed() -> None:
    with Allocations() as counted:
        kept = torch.zeros(1_000)
        other = kept + 1
        assert counted.live == 8_000
        view = other[:10]
        del other
        assert counted.live == 8_000  # a view keeps it
        del view
        assert counted.live == 4_000
        assert counted.peak == 8_000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell private memory from mapped files")
@pytest.mark.parametrize(
    ("recipe", "overrides", "workers"),
    [
        ("sibrar-cold-item", ["training.batch_size=2048", "training.negatives=2"], 1),  # most of it tables
        ("sibrar-warm", ["training.batch_size=1024"], 1),  # most of it activations
        ("sibrar-cold-item", ["training.batch_size=2048", "training.negatives=2", "training.table_updates=lazy"], 1),
        ("sibrar-cold-item", ["training.batch_size=4096", "training.negatives=2", "training.table_updates=lazy"], 2),
        ("sibrar-warm", ["training.batch_size=1024", "training.interaction_table=row_sharded"], 2),
        (
            "sibrar-cold-item",
            [
                *("training.batch_size=2048", "training.negatives=2"),
                *("training.interaction_table=row_sharded", "training.table_updates=lazy"),
            ],
            2,
        ),
    ],
)
def test_what_is_estimated_is_what_is_measured(
    recipe: str, overrides: list[str], workers: int, dataset: Path, tmp_path: Path
) -> None:
    overrides = [f"dataset={dataset}", "training.device=cpu", "training.epochs=1", "training.checkpoint_every=2", *overrides]
    rank = estimate(load_config(TrainConfig, recipe, overrides), workers).rank
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.scale.trained", str(tmp_path / "result.json"), recipe, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    measured = json.loads((tmp_path / "result.json").read_text())["private"]
    assert measured > 200_000_000
    assert rank.training + rank.checkpoint == pytest.approx(measured, rel=TOLERANCE)
