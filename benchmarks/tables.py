"""Tables in Markdown of what was measured side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bench import Found


def of_machine(machine: Mapping[str, Any]) -> str:
    """What figures depend on, in a sentence."""
    return (
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, load {machine['load']} at the end; "
        f"Python {machine['python']}, torch {machine['torch']}."
    )


def ratios(found: Found) -> list[str]:
    """A row for each ratio of a part."""
    return table(("ratio of medians", "", "a processor second", "target"), [_ratio(ratio) for ratio in found["ratios"]])


def table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ("---",) * len(headings), *rows)]


def number(value: float | None, times: float = 1) -> str:
    """Whole from 100 on, else with three digits; nothing for what is not told."""
    if value is None:
        return ""
    return f"{value * times:,.0f}" if value * times >= 100 else f"{value * times:.3g}"


def _ratio(found: Mapping[str, Any]) -> tuple[str, ...]:
    by_processor = f"{found['by_processor']:.3g}" if "by_processor" in found else ""
    return found["what"], f"{found['ratio']:.3g}", by_processor, _target(found["target"])


def _target(target: float | None) -> str:
    return "" if target is None else (f"at most {target:g}" if target < 1 else f"at least {target:g}")
