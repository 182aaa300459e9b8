"""The figures as tables in Markdown."""

from collections.abc import Mapping

from benchmarks.bench import Found, Kept, median
from benchmarks.tables import number, of_machine, ratios, table

TITLES = {
    "engine": "SiBraR on MovieLens 1M: ours and dense PyTorch, as published",
    "excluding": "The same with `exclude_target`",
    "scale": "SiBraR on 200,000 users, 100,000 items, 20 million interactions",
    "peers": "DMF and matrix factorization on MovieLens 1M: ours and other libraries",
    "workers": "SiBraR on one process and on two",
    "quality": "Seconds to validation ndcg@10 of cold items, MovieLens 1M",
}


def markdown(parts: Mapping[str, Found]) -> str:
    """All parts that are complete, in the order of `TITLES`."""
    sections = ["# Training: speed, memory, time to quality\n"]
    for name, title in TITLES.items():
        if "machine" in parts.get(name, {}):
            found = parts[name]
            lines = [f"## {title}\n", of_machine(found["machine"]), ""]
            lines += _curves(found["contenders"]) if name == "quality" else _rates(found["contenders"])
            if name == "workers":
                lines += ["", *_communication(found["contenders"])]
            if name == "scale":
                lines += ["", _extrapolated(found["contenders"])]
            if found["ratios"]:
                lines += ["", *ratios(found)]
            sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _rates(contenders: list[Kept]) -> list[str]:
    """A row for each contender: medians over its runs."""
    headings = "|threads|runs|positives/s|lowest to highest|ms a step|peak RSS (MiB)|processors|positives a processor second"
    return table(("", *headings.split("|")), [_rate(kept) for kept in contenders])


def _rate(kept: Kept) -> tuple[str, ...]:
    rates = [run["positives_per_second"] for run in kept["runs"]]
    return (
        kept["setting"],
        kept["name"],
        str(kept["runs"][0]["threads"]),
        str(len(rates)),
        number(median(kept, "positives_per_second")),
        f"{number(min(rates))} to {number(max(rates))}",
        number(median(kept, "step_seconds"), 1000),
        number(median(kept, "peak_rss_mebibytes")),
        f"{median(kept, 'processors'):.2f}",
        number(median(kept, "positives_per_processor_second")),
    )


def _curves(contenders: list[Kept]) -> list[str]:
    """A row for each contender: medians over seeds of the seconds to each threshold."""
    thresholds = list(contenders[0]["runs"][0]["reached"])
    rows = []
    for kept in contenders:
        cells = []
        for threshold in thresholds:
            times = sorted(run["reached"][threshold]["seconds"] for run in kept["runs"] if run["reached"][threshold])
            steps = sorted(run["reached"][threshold]["steps"] for run in kept["runs"] if run["reached"][threshold])
            whole = len(times) == len(kept["runs"])
            cells.append(f"{times[len(times) // 2]:.1f} ({steps[len(steps) // 2]})" if whole else "not reached")
        best = max(value for run in kept["runs"] for value in run["best"])
        rows.append(
            (kept["setting"], str(len(kept["runs"][0]["best"])), *cells, f"{best:.4f}", f"{median(kept, 'evaluating'):.1f}")
        )
    headings = ("", "seeds", *(f"{threshold} (steps)" for threshold in thresholds), "best", "of which evaluating")
    return table(headings, rows)


def _communication(contenders: list[Kept]) -> list[str]:
    """What two processes send each other."""
    scalars = contenders[0]["runs"][0]["parameters"]
    megabytes = 4 * scalars / 1e6
    return [
        f"On MovieLens 1M a step sums the gradients of {scalars:,} parameters over the processes, 4 bytes each: "
        f"{megabytes:.1f} MB, whatever the batch, beside running statistics and three numbers. In a ring of W processes each "
        "sends and receives 2 (W - 1) / W times as much; with two, once as much. Where tables are divided, their gradients "
        "stay: ids, sums of rows and gradients of these travel, to and from the rank that holds the rows. Memory and processor "
        "time are those of one of the processes. Each process encodes what is distinct in its half of a batch: of few films "
        "and users that is nearly all of them in either half, so the two together do more than the one."
    ]


def _extrapolated(contenders: list[Kept]) -> str:
    """What memory the dense one would need for the batches of ours that it cannot take."""
    points = {
        name: [(_batch(kept), median(kept, "peak_rss_mebibytes") or 0.0) for kept in contenders if kept["name"] == name]
        for name in ("dense", "ours")
    }
    (few, low), (many, high) = points["dense"]
    each = (high - low) / (many - few)
    # Of a batch that is also computed in parts, whole comes first.
    ours = sorted(dict(reversed(points["ours"])).items())
    needs = [(batch, found, low + each * (batch - few)) for batch, found in ours if batch > many]
    told = ", ".join(
        f"{needed / 1024:,.0f} GiB at {batch}, of which ours is {found / needed:.3f}" for batch, found, needed in needs
    )
    return (
        f"The dense one needs {each:.2f} MiB more for each positive of a batch; {many} are about what 24 GiB can hold. "
        f"In proportion it would need {told}."
    )


def _batch(kept: Kept) -> int:
    return int(kept["setting"].split()[1])
