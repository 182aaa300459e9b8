"""Faults on purpose: what was there stays, what is not whole is not there, and one clear line says why."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sibra_dist.config import to_yaml
from sibra_dist.data.manifest import Manifest, sha256_of, verify_shard
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare
from sibra_dist.etl.tables import list_rows
from sibra_dist.etl.write import Target, write_table

pytestmark = [pytest.mark.spark, pytest.mark.slow]

Small = Callable[..., PrepareConfig]
SPARK = {"master": "local[1]", "driver_memory": "1g", "settings": {"spark.sql.shuffle.partitions": "2"}}


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def command(config: PrepareConfig, folder: Path, to: Path, *options: str) -> list[str]:
    """`sibra-dist prepare` as a user calls it."""
    (folder / "prepare.yaml").write_text(to_yaml(config), encoding="utf-8")
    return [sys.executable, "-m", "sibra_dist.cli", "prepare", str(folder / "prepare.yaml"), "--to", str(to), *options]


@pytest.mark.parametrize("stage", ["filter", "write"])
def test_killed_job_leaves_the_former_dataset_and_the_next_one_sweeps_up(
    small: Small, tmp_path: Path, put_small: Callable[[Path], Manifest], stage: str
) -> None:
    to = tmp_path / "dataset"
    former = put_small(to)
    before = content(to)
    other = small(split={"seed": 1}, spark=SPARK)
    process = subprocess.Popen(
        command(other, tmp_path, to, "--overwrite"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    with process.stderr:
        told = next(line for line in process.stderr if line.strip() == f"preparing: {stage}")
    assert told
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert Manifest.read(to) == former
    for shard in former.all_shards():
        verify_shard(to, shard)
    assert before.items() <= content(to).items()
    assert prepare(other, to, overwrite=True).protocol.seed == 1
    there = {shard.path for shard in Manifest.read(to).all_shards()}
    assert set(content(to)) == {"manifest.json", *there}


def unshared(folder: Path, size: str) -> list[str]:
    """Makes `folder` a disk of its own, of a size, for the command that follows and what it starts."""
    return ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} none {folder} && exec "$@"', "sh"]


def can_unshare(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*unshared(folder, "1m"), "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize(("work", "size"), [("beside the dataset", "20k"), ("elsewhere", "8k")])
def test_full_disk_is_told_and_leaves_nothing(small: Small, tmp_path: Path, work: str, size: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_unshare(disk):
        pytest.skip("no disk can be made here: unshare and tmpfs are needed")
    own = SPARK if work == "beside the dataset" else {**SPARK, "work": str(tmp_path / "work")}
    call = command(small(spark=own), tmp_path, disk / "dataset")
    shown = " ".join(["; code=$?; find", str(disk), "-type f; exit $code"])
    script = f'"$@"{shown}'
    done = subprocess.run([*unshared(disk, size), "sh", "-c", script, "sh", *call], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert str(disk / "dataset") in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout.strip() == ""


def test_worker_that_dies_once_changes_nothing(spark: SparkSession, tmp_path: Path) -> None:
    pairs = spark.createDataFrame(
        [(index, index + step) for index in range(40) for step in range(3)], "position int, other int"
    )
    target = Target(Place.at(tmp_path / "dataset"), shard_bytes=100)
    rows = list_rows("items", (), dense=True)
    expected = write_table(pairs, "histories/users", target, rows, 40, F.lit(4))
    mark = tmp_path / "died"

    def dying(part: pa.Table, start: int, stop: int) -> pa.Table:
        built = rows(part, start, stop)
        if start > 0:
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return built
            os._exit(1)
        return built

    other = Target(Place.at(tmp_path / "other"), shard_bytes=100)
    assert write_table(pairs, "histories/users", other, dying, 40, F.lit(4)) == expected
    assert mark.exists()
    assert content(tmp_path / "other") == content(tmp_path / "dataset")


def test_second_preparation_of_one_place_is_refused(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    to = tmp_path / "dataset"

    def meanwhile(stage: str) -> None:
        if stage == "filter":
            with pytest.raises(DatasetError, match="another preparation is writing to"):
                prepare(small(split={"seed": 1}), to)

    manifest = prepare(small(), to, progress=meanwhile)
    assert manifest == Manifest.read(to)


def test_place_that_cannot_be_written_is_told(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DatasetError, match="cannot be written: Not a directory"):
        prepare(small(), tmp_path / "file" / "dataset")
