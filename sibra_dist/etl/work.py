"""Intermediate tables: what a step leaves for the next is written to a folder that every executor reaches.

A table in files cuts the plan, so that no later step computes it again and no plan grows with the rounds of a loop; it
outlives an executor, which a cached one does not; and Spark knows its size, and joins accordingly.
"""

import itertools
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pyspark.sql import DataFrame, SparkSession

from sibra_dist.errors import ConfigError
from sibra_dist.etl.frames import by_the_letter, strict_reader

Key = TypeVar("Key")
Result = TypeVar("Result")


def together(calls: Mapping[Key, Callable[[], Result]]) -> dict[Key, Result]:
    """The results of some calls, each of which runs jobs of Spark: at the same time, so that small jobs fill the cores too."""
    with ThreadPoolExecutor(max(len(calls), 1)) as pool:
        running = {key: pool.submit(call) for key, call in calls.items()}
        return {key: future.result() for key, future in running.items()}


@dataclass(frozen=True)
class Work:
    """A folder of intermediate tables of one preparation."""

    spark: SparkSession
    uri: str
    """As Hadoop's file systems take it: `file:///...` for a folder of this machine."""
    _number: "itertools.count[int]" = field(default_factory=itertools.count)

    def store(self, frame: DataFrame, name: str) -> DataFrame:
        """The rows of `frame`, computed now and read from files from now on. `name` is for whoever looks into the folder."""
        return self.stored(frame, name)[0]

    def stored(self, frame: DataFrame, name: str) -> tuple[DataFrame, str]:
        """The same, and the URI of the files, for what is to be deleted before the end."""
        path = f"{self.uri}/{next(self._number):03d}-{name}"
        frame.write.parquet(path, compression="snappy")
        return strict_reader(self.spark).schema(frame.schema).parquet(by_the_letter(path)), path

    def delete(self, path: str) -> None:
        """Delete what `stored` wrote, which nothing reads any more."""
        folder = self.spark._jvm.org.apache.hadoop.fs.Path(path)  # type: ignore[union-attr]
        folder.getFileSystem(self.spark._jsc.hadoopConfiguration()).delete(folder, True)

    def check_shared(self) -> None:
        """Check that a folder of the machine's file systems is the same folder for all tasks of a cluster.

        Raises:
            ConfigError: it is not; what tasks elsewhere write there would be lost.
        """
        if not self.uri.startswith("file://") or is_local(self.spark.sparkContext.master or ""):
            return
        probe = Path(self.uri.removeprefix("file://")) / "probe"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        tasks = 2 * self.spark.sparkContext.defaultParallelism
        seen = self.spark.sparkContext.parallelize(range(tasks), tasks).map(lambda _: os.path.exists(probe)).collect()
        if not all(seen):
            raise ConfigError(
                f"{probe.parent.parent} is not the same folder on every machine of the cluster; "
                "name one that is, or a URI, with --to and spark.work"
            )


def is_local(master: str) -> bool:
    """Whether Spark runs in one process of this machine."""
    return re.fullmatch(r"local(\[.*\])?", master) is not None
