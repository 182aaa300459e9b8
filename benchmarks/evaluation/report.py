"""The figures as tables in Markdown."""

from collections.abc import Mapping
from typing import Any

from benchmarks.bench import Found, Kept, median
from benchmarks.tables import number, of_machine, ratios, table

TITLES = {
    "metrics": "From scores to averages: 50,000 users, 20,000 items, lists of 100",
    "topk": "From embeddings of 64 dimensions to the 100 best items",
    "recommend": "`sibra-dist recommend` for a million users",
}


def markdown(parts: Mapping[str, Found]) -> str:
    """All parts that are complete, in the order of `TITLES`."""
    sections = ["# Evaluation: speed, memory, agreement\n"]
    for name, title in TITLES.items():
        found = parts.get(name, {})
        if "machine" in found:
            lines = [f"## {title}\n", of_machine(found["machine"]), ""]
            lines += _recommended(found) if name == "recommend" else _contest(found)
            sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _contest(found: Found) -> list[str]:
    headings = (
        "||users|metrics|runs|users/s|lowest to highest|users a processor second|scores: users/s|peak RSS (MiB)|grown (MiB)"
    )
    lines = [*table(tuple(headings.split("|")), [_rate(kept) for kept in found["contenders"]]), "", *ratios(found)]
    rows = [
        (row["setting"], row["name"], row["metric"], f"{row['most']:.1g}", row["why"] or "")
        for row in found["agreement"]
        if not row["name"].startswith("ours")
    ]
    headings = "||metric|largest difference, a part of ours|why, where it is not rounding"
    return [*lines, "", *table(tuple(headings.split("|")), rows)]


def _rate(kept: Kept) -> tuple[str, ...]:
    run = kept["runs"][0]
    rates = [each["users_per_second"] for each in kept["runs"]]
    scoring = median(kept, "scoring_seconds") or 0.0
    return (
        kept["setting"],
        kept["name"],
        f"{run['users']:,}",
        str(len(run["metrics"])),
        str(len(rates)),
        number(median(kept, "users_per_second")),
        f"{number(min(rates))} to {number(max(rates))}",
        number(median(kept, "users_per_processor_second")),
        number(run["users"] / scoring) if scoring else "included",
        number(median(kept, "peak_rss_mebibytes")),
        number(median(kept, "grown_mebibytes")),
    )


def _recommended(found: Mapping[str, Any]) -> list[str]:
    told = found["told"]
    rest = (told["shards"] - told["kept"]) / told["shards"]
    rows = [
        ("users, items, dimensions, items a user", f"{told['users']:,}, {told['items']:,}, {told['size']}, {told['k']}"),
        (
            "killed with so many of its shards",
            f"{told['kept']} of {told['shards']}, after {told['killed_after_seconds']:,.0f} s",
        ),
        ("continued: seconds, peak RSS (MiB)", _taken(told["continued"])),
        (f"undisturbed, {told['undisturbed']['users']:,} users: seconds, peak RSS (MiB)", _taken(told["undisturbed"])),
        ("shards that are the same, byte for byte", f"{told['same_files']} of {told['same_files']} that were made twice"),
        ("users/s, a processor second", f"{number(told['users_per_second'])}, {number(told['users_per_processor_second'])}"),
        ("minutes for a million users on one core", number(1_000_000 / told["users_per_processor_second"] / 60)),
        ("MiB of files", number(told["mebibytes"])),
    ]
    return [*table(("", ""), rows), "", f"Of the users, {rest:.0%} were recommended to after the kill, at the rate told."]


def _taken(measured: Mapping[str, float]) -> str:
    return f"{number(measured['seconds'])}, {number(measured['peak_rss_mebibytes'])}"
