"""What a study finds: a table and a plot, made of means over seeds with their deviations."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from sibra_dist.data.storage import write_atomically


@dataclass(frozen=True)
class Answer:
    """A table, and curves or bars of one metric."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    axis: str
    """What the plot shows."""
    places: Sequence[float] | Sequence[str]
    """On the horizontal axis."""
    curves: Mapping[str, Sequence[Sequence[float]]]
    """By curve, for each place one value for each seed."""
    horizontal: str = ""

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}"]
        return "\n".join([*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in self.rows.items())]) + "\n"

    def write(self, folder: Path, name: str) -> None:
        """Write the table and the plot."""
        write_atomically(folder / f"{name}.md", f"# {self.title}\n\n{self.markdown()}\n![{self.axis}]({name}.svg)\n".encode())
        matplotlib.use("svg")
        # The same file for the same figures.
        matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9})
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        for curve, points in self.curves.items():
            means, deviations = [statistics.mean(values) for values in points], [deviation(values) for values in points]
            axes.errorbar(self.places, means, deviations, label=curve, marker="o", capsize=3)
        axes.set(title=self.title, xlabel=self.horizontal, ylabel=self.axis)
        axes.legend()
        axes.grid(alpha=0.3)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def values(results: Sequence[Mapping[str, Any]], metric: str, evaluation: str = "test") -> list[float]:
    """A metric of an evaluation, for each seed."""
    return [float(result["evaluations"][evaluation]["metrics"][metric]) for result in results]


def spread(numbers: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(numbers):.{digits}f} ± {deviation(numbers):.{digits}f}"


def deviation(numbers: Sequence[float]) -> float:
    """The standard deviation; 0 of a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0
