"""A real cluster on this machine: a standalone master and two workers, processes of their own, run what a user submits."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyspark
import pytest
from pyspark.sql import SparkSession

from sibra_dist.config import to_yaml
from sibra_dist.data.manifest import Manifest
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare

pytestmark = [pytest.mark.spark, pytest.mark.slow]

Small = Callable[..., PrepareConfig]
ROOT = Path(__file__).parents[2]
SPARK_HOME = Path(pyspark.__file__).parent
PATIENCE = 300
"""Seconds in which a process that is well would have said what is waited for."""


def environment() -> dict[str, str]:
    return {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable, "SPARK_HOME": str(SPARK_HOME)}


@contextmanager
def daemon(kind: str, log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{kind}", "--host", "127.0.0.1", *arguments],
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(log: Path, pattern: str) -> str:
    """What a log says, once it says it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = re.search(pattern, log.read_text(errors="replace"))
        if found is not None:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"{log} never said {pattern}: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """The URL of a cluster's master, and the process ids of its two workers."""
    with ExitStack() as running:
        log = tmp_path / "master.log"
        running.enter_context(daemon("master.Master", log, "--port", "0", "--webui-port", "0"))
        url = said(log, r"Starting Spark master at (spark://\S+)")
        workers = []
        for number in range(2):
            log = tmp_path / f"worker{number}.log"
            work = ["--cores", "1", "--memory", "1g", "--webui-port", "0", "--work-dir", str(tmp_path / f"worker{number}")]
            workers.append(running.enter_context(daemon("worker.Worker", log, *work, url)).pid)
            said(log, r"(Successfully registered) with master")
        yield url, workers


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this package, under a version that is installed nowhere."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "sibra_dist", folder / "source" / "sibra_dist")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    package = folder / "source" / "sibra_dist" / "__init__.py"
    package.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.0+wheel"', package.read_text()))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def executors_of(worker: int) -> list[int]:
    """Process ids of the executors that a worker has started."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(worker)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "CoarseGrainedExecutorBackend" in line]


def test_submitted_job_that_loses_an_executor_makes_the_same_dataset(
    spark: SparkSession, small: Small, tmp_path: Path, cluster: tuple[str, list[int]], wheel: Path
) -> None:
    url, workers = cluster
    config = small(split={"protocol": "cold_item"})
    expected = prepare(config, tmp_path / "local")
    (tmp_path / "prepare.yaml").write_text(to_yaml(config), encoding="utf-8")
    settings = {"spark.executor.memory": "512m", "spark.driver.memory": "512m", "spark.driver.host": "127.0.0.1"}
    submit = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", url, "--py-files", str(wheel)]
    submit += [part for name, value in settings.items() for part in ("--conf", f"{name}={value}")]
    submit += [str(ROOT / "jobs" / "prepare.py"), str(tmp_path / "prepare.yaml"), "--to", str(tmp_path / "cluster")]
    log = tmp_path / "submit.log"
    with log.open("wb") as output:
        with subprocess.Popen(submit, stdout=output, stderr=output, env=environment(), cwd=tmp_path) as process:
            said(log, r"(preparing: filter)")
            victims = executors_of(workers[0])
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            assert victims
        assert process.returncode == 0, log.read_text(errors="replace")[-3000:]
    manifest = Manifest.read(tmp_path / "cluster")
    assert manifest.package_version == "0.0.0+wheel"
    assert manifest.digest == expected.digest
    assert manifest.shards == expected.shards
