"""The results as tables: means over seeds with their deviations, published figures, and tests of the differences."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from scipy.stats import ttest_rel

from benchmarks.quality.entries import ENTRIES, SPLITS, Setting

METRICS = ("recall@10", "precision@10", "map@10", "ndcg@10", "coverage@10")
PUBLISHED = ("recall@10", "map@10")
HEADINGS = (
    "model",
    "seeds",
    *METRICS,
    "AP over relevant",
    *(f"published {metric}" for metric in PUBLISHED),
    "behind by",
    "p (seeds)",
    "p (users)",
    "minutes",
    "MiB",
)
BEST = "SiBraR, best"
BASELINES = [name for name in ENTRIES if not name.startswith(("SiBraR", "universal"))]

Results = Mapping[str, list[dict[str, Any]]]
"""By row and setting (`MF, warm`), a result of `benchmarks.experiment` for each seed."""


def show(results: Results) -> None:
    """Print a table for each setting."""
    console = Console(width=220, highlight=False)
    for setting in SPLITS:
        rows = table(results, setting)
        if rows:
            columns = (Column(heading, justify="left" if heading == "model" else "right") for heading in HEADINGS)
            shown = Table(*columns, title=setting, title_justify="left", box=None, pad_edge=False)
            for row in rows:
                shown.add_row(*row)
            console.print(shown)
            console.print()


def markdown(results: Results) -> str:
    """The same tables in Markdown."""
    parts = ["# MovieLens 1M: test split, mean and standard deviation over seeds\n"]
    for setting in SPLITS:
        lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ("---",) * len(HEADINGS), *table(results, setting))]
        parts.append(f"## {setting.capitalize()}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def table(results: Results, setting: Setting) -> list[tuple[str, ...]]:
    """Every model in a setting: mean and deviation of each metric over its seeds, and what was published; see `HEADINGS`."""
    rows = []
    for name, entry in ENTRIES.items():
        mine = of(results, setting, name)
        if not mine:
            continue
        published = entry.published.get(setting, {})
        rows.append(
            (
                name,
                str(len(mine)),
                *(spread([metric_of(result, metric) for result in mine.values()]) for metric in METRICS),
                over_relevant(mine.values()),
                *(f"{published[metric]:.4f}".removeprefix("0") if metric in published else "" for metric in PUBLISHED),
                *behind(results, setting, name),
                f"{statistics.mean(result['train']['seconds'] for result in mine.values()) / 60:.1f}",
                f"{max(result['train']['peak_rss_mebibytes'] for result in mine.values()):.0f}",
            )
        )
    return rows


def of(results: Results, setting: Setting, name: str) -> dict[int, dict[str, Any]]:
    """The results of a model in a setting, by seed."""
    return {result["seed"]: result for result in results.get(f"{name}, {setting}", [])}


def metric_of(result: Mapping[str, Any], metric: str) -> float:
    """A metric of the test split."""
    value: float = result["evaluations"]["test"]["metrics"][metric]
    return value


def over_relevant(results: Iterable[Mapping[str, Any]]) -> str:
    """AP@10 over the number of relevant items, as far as it is known of all seeds."""
    values = [result["map_over_relevant@10"] for result in results if "map_over_relevant@10" in result]
    return spread(values) if values else ""


def behind(results: Results, setting: Setting, name: str) -> tuple[str, str, str]:
    """By how much a model's recall@10 is behind that of the best SiBraR, and the p of two tests that it is not behind at all.

    Both are paired, one-sided t-tests, and both p are multiplied by the number of baselines (Bonferroni). Over seeds: would
    it be so on another split? Over the users of a seed, the largest p of all seeds: is it so on each of these splits?
    """
    best, other = of(results, setting, BEST), of(results, setting, name)
    seeds = sorted(best.keys() & other.keys())
    if name == BEST or len(seeds) < 2:
        return "", "", ""
    a, b = ([metric_of(side[seed], "recall@10") for seed in seeds] for side in (best, other))
    over_seeds = float(ttest_rel(a, b, alternative="greater").pvalue)
    over_users = [other[seed]["p_users"] for seed in seeds if "p_users" in other[seed]]
    shown = corrected(max(over_users)) if len(over_users) == len(seeds) else ""
    return f"{statistics.mean(a) - statistics.mean(b):+.4f}", corrected(over_seeds), shown


def corrected(p: float) -> str:
    """A p times the number of baselines."""
    value = min(1.0, p * len(BASELINES))
    if value < 1e-99:
        return "<1e-99"
    return f"{value:.4f}".removeprefix("0") if value >= 1e-4 else f"{value:.0e}"


def spread(values: list[float]) -> str:
    """Mean and standard deviation, of figures from 0 to 1."""
    mean = f"{statistics.mean(values):.4f}".removeprefix("0")
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):.3f}".replace("±0", "±")
