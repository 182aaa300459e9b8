"""What the benchmark prints: its tables, how cost grows with rows, and where Spark overtakes pandas."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

Measurements = dict[tuple[int, str], dict[str, Any]]
"""Figures by number of rows and step."""
Point = tuple[float, float, float]
"""Rows, and the figures of pandas and of Spark."""

LARGEST_GROWTH = 0.25


def show(measurements: Measurements, console: Console) -> None:
    """Print everything that has been measured."""
    steps = {what for _, what in measurements}
    tables = [totals(measurements), *(stage_shares(measurements, what) for what in ("pandas", "spark") if what in steps)]
    if _opened(measurements):
        tables += [reading_back(measurements), reading_memory(measurements)]
    for table in tables:
        console.print(table)
        console.print()
    for line in (*growth(measurements), *crossovers(measurements)):
        console.print(line)


def totals(measurements: Measurements) -> Table:
    """Time, memory and bytes of each preparation."""
    headings = ("rows", "step", "seconds", "rows/s", "µs/row", "peak RSS", "peak PSS", "result", "disk written", "processes")
    table = _table("Preparation (sizes in MiB)", headings)
    for (rows, what), line in sorted(measurements.items()):
        if what.startswith("open"):
            continue
        sizes = (line["peak_rss"], line["peak_pss"], line["result_mebibytes"], line["disk_written"])
        seconds = line["seconds"]
        table.add_row(
            f"{rows:,}",
            what,
            f"{seconds:.1f}",
            f"{rows / seconds:,.0f}",
            f"{1e6 * seconds / rows:.2f}",
            *(f"{size:,.0f}" for size in sizes),
            str(line["processes"]),
        )
    return table


def stage_shares(measurements: Measurements, what: str) -> Table:
    """Which share of the time each stage took."""
    lines = _lines(measurements, what)
    stages = list(dict.fromkeys(stage for line in lines for stage in line["stages"]))
    table = _table(f"Shares of the time, {what}", ("rows", *stages))
    for line in lines:
        shares = (line["stages"].get(stage, 0.0) / line["seconds"] for stage in stages)
        table.add_row(f"{line['rows']:,}", *(f"{share:.0%}" for share in shares))
    return table


def reading_back(measurements: Measurements) -> Table:
    """Seconds from a prepared dataset to the first training batch, and the peak of memory."""
    stages = ("start", "open", "model", "batch")
    headings = ("rows", "cache", "seconds", *stages, "peak RSS")
    table = _table("Reading back to the first training batch (seconds, MiB)", headings)
    for rows, cache, line in _opened(measurements):
        seconds = (line["seconds"], *(line["stages"][stage] for stage in stages))
        table.add_row(f"{rows:,}", cache, *(f"{second:.2f}" for second in seconds), f"{line['memory']['batch']['peak']:,.0f}")
    return table


def reading_memory(measurements: Measurements) -> Table:
    """Memory after each stage of reading back: the process's own pages, and mapped pages of files, which can be dropped."""
    stages = ("imports", "open", "model", "batch")
    headings = [f"{kind}, {stage}" for kind in ("own", "mapped") for stage in stages]
    table = _table("Memory after each stage of reading back (MiB)", ("rows", "cache", *headings))
    for rows, cache, line in _opened(measurements):
        sizes = [line["memory"][stage][kind] for kind in ("own", "mapped") for stage in stages]
        table.add_row(f"{rows:,}", cache, *(f"{size:,.0f}" for size in sizes))
    return table


def growth(measurements: Measurements) -> Iterable[str]:
    """How the cost of a row on Spark grows from each size to the next."""
    lines = _lines(measurements, "spark")
    for small, large in pairwise(lines):
        grown = (large["seconds"] / large["rows"]) / (small["seconds"] / small["rows"]) - 1
        verdict = ""
        if small["rows"] >= 10_000_000:
            verdict = f", {'within' if grown <= LARGEST_GROWTH else 'MORE THAN'} the {LARGEST_GROWTH:.0%} allowed"
        yield f"Spark, {small['rows']:,} to {large['rows']:,} rows: cost per row {grown:+.0%}{verdict}"


def crossovers(measurements: Measurements) -> Iterable[str]:
    """Where Spark becomes the better choice, by time and by memory, as far as has been measured."""
    both = sorted(rows for rows, what in measurements if what == "pandas" and (rows, "spark") in measurements)
    if len(both) < 2:
        return
    for name, kind in (("time", "seconds"), ("memory", "peak_rss")):
        points = [(float(rows), measurements[rows, "pandas"][kind], measurements[rows, "spark"][kind]) for rows in both]
        ratios = "; ".join(f"{spark / pandas:.1f} times pandas' at {rows:,.0f} rows" for rows, pandas, spark in points)
        yield f"Spark's {name}: {ratios}. {_told(crossing(points), both)}"


def crossing(points: list[Point]) -> float | None:
    """The number of rows where Spark's figure falls below pandas', by straight lines between and beyond the points.

    Between the first two neighbours of which pandas is ahead at one and Spark at the other; else beyond the last, if the
    lines through the last two meet there. None if they do not. Less than the first point: Spark is ahead at once.
    """
    if points[0][2] <= points[0][1]:
        return 0.0
    pairs = list(pairwise(points))
    for left, right in pairs:
        if right[2] <= right[1] or (left, right) == pairs[-1]:
            rows, gap_left, gap_right = right[0] - left[0], left[2] - left[1], right[2] - right[1]
            # Where the gap does not narrow it never closes.
            return left[0] + rows * gap_left / (gap_left - gap_right) if gap_right < gap_left else None
    return None


def _told(crossing: float | None, rows: list[int]) -> str:
    if crossing is None:
        return f"pandas is ahead at all of them: no crossover up to {rows[-1]:,} rows"
    if crossing < rows[0]:
        return "Spark is ahead at all of them"
    if crossing <= rows[-1]:
        return f"Straight lines between the measurements cross at {crossing:,.0f} rows"
    return f"pandas is ahead at all of them; lines drawn on from the last two would cross at {crossing:,.0f} rows, not measured"


def _opened(measurements: Measurements) -> list[tuple[int, str, dict[str, Any]]]:
    """Rows, `empty` or `warm`, and the figures of each reading back."""
    opened = [(rows, what, line) for (rows, what), line in sorted(measurements.items()) if what.startswith("open")]
    return [(rows, what.removeprefix("open, ").removesuffix(" cache"), line) for rows, what, line in opened]


def _lines(measurements: Measurements, what: str) -> list[dict[str, Any]]:
    return [line for (_, step), line in sorted(measurements.items()) if step == what]


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 1 and heading in ("step", "cache") else "right")
    return table
