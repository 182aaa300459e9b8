"""Preparation of 1, 10 and 50 million synthetic interactions on one machine, in `local[2]` with 6 GiB of driver memory.

    python -m benchmarks.etl [--rows 1_000_000 10_000_000] [--folder DIR]

For each size: generate the source, prepare it with plain pandas and with Spark, check that both keep the same, and read Spark's
dataset back to the first training batch, once with an empty cache and once with a warm one. Each step is a process of its
own, and its figures are one line of `results.jsonl` in the folder: what has a line is not measured again, so an interrupted
benchmark continues. 50 million rows take about 8 GiB of disk on the way, which are freed when the size is done.
"""

import argparse
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.etl.measuring import run_measured, size_of
from benchmarks.etl.report import Measurements, show
from benchmarks.etl.synthetic import SUMMARY
from benchmarks.etl.task import COUNTS
from sibra_dist.data.manifest import MANIFEST

ROWS = (1_000_000, 10_000_000, 50_000_000)
PANDAS_ROWS = 10_000_000


class Size:
    """The steps of one number of rows; each is skipped where its figures are there already."""

    def __init__(self, rows: int, folder: Path, measurements: Measurements) -> None:
        """Work in `folder`, which may hold what an interrupted run has left."""
        self.rows = rows
        self.folder = folder / f"{rows}"
        self.measurements = measurements
        self._source, self._dataset, self._cache = (self.folder / name for name in ("source", "dataset", "cache"))
        self._log = folder / f"{rows}.log"

    def measure(self, with_pandas: bool) -> None:
        """Take every step that has no figures yet."""
        if with_pandas and not self._known("pandas"):
            self._need_source()
            tables = self.folder / "pandas"
            told = self._run("plain_pandas", self._source, tables)
            self._record("pandas", told | {"result_mebibytes": size_of(tables)})
            shutil.rmtree(tables)
        if not self._known("spark"):
            self._prepare()
        if not (self._known("open, empty cache") and self._known("open, warm cache")):
            if not (self._dataset / MANIFEST).is_file():
                self._prepare()
            shutil.rmtree(self._cache, ignore_errors=True)
            for what in ("open, empty cache", "open, warm cache"):
                self._record(what, self._run("read_back", self._dataset, self._cache))

    def _prepare(self) -> None:
        """Prepare the dataset with Spark, anew."""
        self._need_source()
        scratch = self.folder / "spark"
        for left_over in (self._dataset, scratch):
            shutil.rmtree(left_over, ignore_errors=True)
        scratch.mkdir(parents=True)
        told = self._run("spark", self._source, self._dataset, scratch)
        shutil.rmtree(scratch)
        self._record("spark", told | {"result_mebibytes": size_of(self._dataset)})

    def _need_source(self) -> None:
        if not (self._source / SUMMARY).is_file():
            told = self._run("synthetic", self._source, str(self.rows))
            self._record("generate", told | {"result_mebibytes": size_of(self._source)})

    def _run(self, module: str, *arguments: str | Path) -> dict[str, Any]:
        return run_measured(f"benchmarks.etl.{module}", *arguments, result=self.folder / "result.json", log=self._log)

    def _known(self, what: str) -> bool:
        return (self.rows, what) in self.measurements

    def _record(self, what: str, told: dict[str, Any]) -> None:
        """Keep the figures, as a line of the file and in `measurements`, unless there are some."""
        if self._known(what):
            return
        line = {"rows": self.rows, "what": what, **told, "environment": _environment()}
        with (self.folder.parent / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.measurements[self.rows, what] = line


def main() -> None:
    """Measure what has not been measured yet, and print it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="sizes; by default 1, 10 and 50 million")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-etl"))
    parser.add_argument("--pandas-rows", type=int, default=PANDAS_ROWS, help="the largest size that pandas prepares, too")
    parser.add_argument("--keep", action="store_true", help="keep sources, datasets and caches")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    measurements = read_measurements(arguments.folder / "results.jsonl")
    for rows in sorted(arguments.rows):
        size = Size(rows, arguments.folder.resolve(), measurements)
        size.folder.mkdir(exist_ok=True)
        size.measure(with_pandas=rows <= arguments.pandas_rows)
        check_agreement(measurements, rows)
        if not arguments.keep:
            shutil.rmtree(size.folder)
    show(measurements, Console(width=128, highlight=False))


def read_measurements(path: Path) -> Measurements:
    """The lines of a file of results, by rows and step; none if there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(line["rows"], line["what"]): line for line in map(json.loads, lines)}


def check_agreement(measurements: Measurements, rows: int) -> None:
    """Check that both sides kept and divided the same number of interactions.

    Raises:
        SystemExit: they did not, so that times cannot be compared.
    """
    if (rows, "pandas") not in measurements:
        return
    spark, pandas = (measurements[rows, what]["counts"] for what in ("spark", "pandas"))
    differing = [f"{name}: Spark {spark[name]}, pandas {pandas[name]}" for name in COUNTS if spark[name] != pandas[name]]
    if differing:
        raise SystemExit(f"at {rows} rows Spark and pandas have not made the same: {'; '.join(differing)}")


def _environment() -> dict[str, str | int]:
    packages = {name: version(name) for name in ("sibra-dist", "pyspark", "pandas", "pyarrow", "torch")}
    return {"cores": os.cpu_count() or 0, "python": platform.python_version(), **packages}


if __name__ == "__main__":
    main()
