"""The Spark session a preparation runs in: the one that is there, or a quiet local one."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from sibra_dist.data.manifest import Source
from sibra_dist.data.storage import Place
from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.etl.config import SparkConfig
from sibra_dist.etl.frames import of_hadoop, reaches
from sibra_dist.etl.work import is_local

OLDEST_JAVA = 17
TASK_ATTEMPTS = 4
PARTITION_BYTES = 32 << 20
JAVA_REMEDY = f"Install Java {OLDEST_JAVA} or newer (Debian: apt install default-jre-headless) or set JAVA_HOME to one"
SUBMITTED = "PYSPARK_GATEWAY_PORT"
"""The variable by which spark-submit tells Python where its Java process listens."""


@contextmanager
def spark_session(config: SparkConfig) -> Iterator[SparkSession]:
    """The session to prepare in: the active one, spark-submit's, or a new one that ends with the block.

    An active session is used as it is and left running. Under spark-submit the submitter's settings stand.

    Raises:
        SibraError: there is no Java that Spark can run on.
    """
    running = SparkContext._active_spark_context is not None
    if running:
        yield SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()
        return
    session = SparkSession.builder.appName("sibra-dist prepare").getOrCreate() if SUBMITTED in os.environ else _start(config)
    try:
        yield session
    finally:
        session.stop()


def _start(config: SparkConfig) -> SparkSession:
    require_java()
    conf = SparkConf().setAll(list(_settings(config).items()))
    if SparkContext._gateway is None:
        SparkContext._ensure_initialized(gateway=_quiet_gateway(conf), conf=conf)
    session = SparkSession.builder.config(conf=conf).getOrCreate()
    if is_local(config.master):
        # The interpreter that has our packages, whatever `python3` on the path is.
        session.sparkContext.pythonExec = sys.executable
    return session


def _settings(config: SparkConfig) -> dict[str, str]:
    settings = {
        "spark.app.name": "sibra-dist prepare",
        "spark.master": config.master,
        "spark.driver.memory": config.driver_memory,
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.adaptive.enabled": "true",
        # Joins with the table of ids: the smaller side is hashed, and the interactions need not be sorted.
        "spark.sql.adaptive.maxShuffledHashJoinLocalMapThreshold": "64m",
    }
    if is_local(config.master):
        settings |= {
            "spark.master": with_retries(config.master),
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
        }
    return settings | config.settings


def with_retries(master: str) -> str:
    """A local master that, as a cluster does, runs a task again that failed; by itself it would give up at once.

    >>> with_retries("local[*]")
    'local[*,4]'
    """
    cores = re.fullmatch(r"local(?:\[([^,]+)\])?", master)
    return f"local[{cores[1] or 1},{TASK_ATTEMPTS}]" if cores else master


@contextmanager
def settled(spark: SparkSession, config: SparkConfig, inputs: Sequence[Source]) -> Iterator[None]:
    """Give the session the SQL settings that a preparation relies on, and its own again afterwards.

    Shuffles get a partition for every 32 MiB of input, where nobody has said how many there should be: Spark joins small ones
    again as it goes, but it cannot divide further than it was told. How large a table or query is, only Spark knows.
    """
    wanted = {"spark.sql.ansi.enabled": "true", "spark.sql.session.timeZone": "UTC"}
    name = "spark.sql.shuffle.partitions"
    sized = all(source.bytes for source in inputs)
    if sized and name not in config.settings and spark.sparkContext.getConf().get(name) is None:
        parts = sum(source.bytes for source in inputs) // PARTITION_BYTES
        wanted[name] = str(min(max(4 * spark.sparkContext.defaultParallelism, parts), 10_000))
    former = {key: spark.conf.get(key) for key in wanted}
    for key, value in wanted.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, was in former.items():
            spark.conf.set(key, was or "")


def work_folder(spark: SparkSession, config: SparkConfig, place: Place) -> tuple[str, Callable[[], None]]:
    """The URI of a folder for intermediate tables, as Hadoop takes it, and what deletes it.

    Raises:
        ConfigError: no folder is known that Spark's driver and executors reach.
    """
    name = f".work-{uuid.uuid4().hex[:12]}"
    if config.work is not None:
        folder = Place.at(config.work) / name
    elif place.is_local or reaches(spark, of_hadoop(place.uri).partition("://")[0]):
        folder = place / name
    elif is_local(spark.sparkContext.master or ""):
        folder = Place.at(tempfile.gettempdir()) / f"sibra-dist{name}"
    else:
        raise ConfigError(
            f"Spark cannot read {place}, where intermediate tables would be put: add its Hadoop connector "
            "(for s3://, spark.jars.packages=org.apache.hadoop:hadoop-aws), or set spark.work to a folder that all of "
            "Spark's machines share"
        )
    return of_hadoop(folder.uri), folder.delete_all


def _quiet_gateway(conf: SparkConf) -> object:
    """Start Java with its start-up chatter in a file that vanishes, and shown only if the start fails."""
    with tempfile.TemporaryFile() as log:
        try:
            return launch_gateway(conf=conf, popen_kwargs={"stderr": log})
        except PySparkRuntimeError as error:
            raise SibraError(f"Spark did not start: {_last_line(log)}. Check the settings under `spark`") from error


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "Java ended without a word"


def require_java() -> None:
    """Check that Spark will find a Java it can run on.

    Raises:
        SibraError: there is none, or it is too old.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if java is None:
        raise SibraError(f"Spark needs Java, and there is no java on the PATH. {JAVA_REMEDY}")
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise SibraError(f"Spark needs Java, and {java} does not run. {JAVA_REMEDY}") from error
    found = re.search(r'version "(?:1\.)?(\d+)', told)
    if found is None or int(found[1]) < OLDEST_JAVA:
        version = found[1] if found else "unknown"
        raise SibraError(f"Spark needs Java {OLDEST_JAVA} or newer, and {java} is version {version}. {JAVA_REMEDY}")
