"""Intermediate tables: what a step leaves for the next is written to a folder that every executor reaches.

A table in files cuts the plan, so that no later step computes it again and no plan grows with the rounds of a loop; it
outlives an executor, which a cached one does not; and Spark knows its size, and joins accordingly.
"""

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pyspark.sql import DataFrame, SparkSession

from sibra_dist.etl.frames import by_the_letter

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
        path = f"{self.uri}/{next(self._number):03d}-{name}"
        frame.write.parquet(path, compression="snappy")
        return self.spark.read.schema(frame.schema).parquet(by_the_letter(path))
