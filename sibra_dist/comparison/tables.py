"""A comparison of runs as text, CSV, LaTeX or Markdown."""

import csv
import io
from collections.abc import Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from sibra_dist.comparison.runs import Against, Line

Form = Literal["text", "csv", "latex", "markdown"]

COLUMNS = {
    "difference": "difference",
    "interval_low": "95 % from",
    "interval_high": "to",
    "effect_size": "d",
    "t": "t",
    "t_p": "p (t)",
    "t_p_bonferroni": "Bonferroni",
    "t_p_holm": "Holm",
    "wilcoxon": "W",
    "wilcoxon_p": "p (W)",
    "wilcoxon_p_bonferroni": "Bonferroni",
    "wilcoxon_p_holm": "Holm",
}
"""Figures of a run against the first: the name in CSV, and the heading elsewhere."""
WORDS = ("metric", "run", "users", "mean")
FORMATS = {"difference": "+.4f", "interval_low": "+.4f", "interval_high": "+.4f", "effect_size": "+.3f", "t": ".2f"}
P_FORMAT = ".2g"
NARROW = tuple(name for name in COLUMNS if name not in ("t", "wilcoxon"))
"""What has room in a line of text; the two statistics stand in CSV."""
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def written(lines: Sequence[Line], form: Form) -> str | Group:
    """The comparison in a form: for `text` what a terminal prints, else the whole text with a newline at its end.

    CSV has every figure in full, and nothing where the first run would be compared with itself.
    """
    if form == "csv":
        return _csv(lines)
    if form == "text":
        return _text(lines)
    heads = [*WORDS, *(COLUMNS[name] for name in NARROW)]
    rows = [_cells(line) for line in lines]
    return _latex(heads, rows) if form == "latex" else _markdown(heads, rows)


def _figures(against: Against) -> dict[str, float]:
    values = {
        "difference": against.difference,
        "interval_low": against.interval[0],
        "interval_high": against.interval[1],
        "effect_size": against.effect_size,
    }
    for name, test in (("t", against.t_test), ("wilcoxon", against.wilcoxon)):
        values |= {
            name: test.outcome.statistic,
            f"{name}_p": test.outcome.p_value,
            f"{name}_p_bonferroni": test.bonferroni,
            f"{name}_p_holm": test.holm,
        }
    return values


def _cells(line: Line) -> list[str]:
    figures = _figures(line.against) if line.against is not None else {}
    told = [format(figures[name], FORMATS.get(name, P_FORMAT)) if name in figures else "" for name in NARROW]
    return [line.metric, line.run, str(line.users), f"{line.mean:.4f}", *told]


def _csv(lines: Sequence[Line]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, [*WORDS, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        figures = _figures(line.against) if line.against is not None else {}
        told = {"metric": line.metric, "run": line.run, "users": line.users, "mean": line.mean}
        writer.writerow({**told, **figures})
    return file.getvalue()


def _text(lines: Sequence[Line]) -> Group:
    parts: list[RenderableType] = []
    for metric in dict.fromkeys(line.metric for line in lines):
        of_metric = [line for line in lines if line.metric == metric]
        heads = ["mean", "difference", "95 % interval", *(COLUMNS[name] for name in NARROW[3:])]
        columns = [Column(head, justify="right", no_wrap=True) for head in heads]
        table = Table(Column("run", overflow="fold", min_width=12), *columns, box=None, pad_edge=False)
        for line in of_metric:
            _, run, _, mean, difference, low, high, *rest = _cells(line)
            table.add_row(*map(Text, (run, mean, difference, f"{low} {high}".strip(), *rest)))
        parts += [Text(f"{metric} of {of_metric[0].users:,} users"), table, Text()]
        others = len(of_metric) - 1
    note = (
        f"Differences to {lines[0].run}, user by user; d is Cohen's, of the differences; p is two-sided, by the paired t-test "
        f"(t) and Wilcoxon's signed-rank test (W), and corrected for {others} run{'s' if others > 1 else ''} a metric"
    )
    return Group(*parts, Text(note, no_wrap=False, overflow="fold"))


def _latex(heads: Sequence[str], rows: Sequence[list[str]]) -> str:
    lines = [r"\begin{tabular}{ll" + "r" * (len(heads) - 2) + "}", r"\hline", _latex_row(heads), r"\hline"]
    return "\n".join([*lines, *map(_latex_row, rows), r"\hline", r"\end{tabular}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"


def _markdown(heads: Sequence[str], rows: Sequence[list[str]]) -> str:
    rule = ["---", "---", *["---:"] * (len(heads) - 2)]
    lines = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells] for cells in (heads, *rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (lines[0], rule, *lines[1:]))
