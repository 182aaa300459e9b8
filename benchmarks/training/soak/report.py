"""The results as tables, and what in them is not as it should be."""

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """All tables of the parts that there are results of."""
    parts = ["# Soak"]
    shown = {"kills": _kills, "leak": _leak, "workers": _workers, "disk": _disk}
    for name, show in shown.items():
        if name in results:
            parts += [show(results[name]), _machine(results[name]["machine"])]
    found = list(faults(results))
    parts.append(
        "\n".join(["**Not as it should be:**", "", *(f"- {fault}" for fault in found)]) if found else "All as it should be."
    )
    return "\n\n".join(parts) + "\n"


def faults(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    return list(_faults(results))


def redone(kill: dict[str, Any], steps_per_epoch: int) -> int | None:
    """The steps that were done again after a kill: from the newest checkpoint to where training was, as last told."""
    if kill["at"] is None or kill["checkpoint"] is None:
        return None
    (epoch, step), (saved_epoch, saved_step) = kill["at"], kill["checkpoint"]
    again: int = max((epoch - saved_epoch) * steps_per_epoch + step - saved_step, 0)
    return again


def _faults(results: dict[str, Any]) -> Iterator[str]:
    if "kills" in results:
        found = results["kills"]
        if not found["kills"]:
            yield "no worker was killed"
        yield from (f"the disturbed training: {difference}" for difference in found["comparison"]["differences"])
        for number, kill in enumerate(found["kills"], 1):
            if kill["resumed"] is not None and kill["checkpoint"] is not None and kill["resumed"] < kill["checkpoint"]:
                yield f"after kill {number} training went on from {kill['resumed']}, before its checkpoint {kill['checkpoint']}"
    for trend in results.get("workers", {"memory": []})["memory"]:
        if not trend["flat"]:
            yield f"memory of a {trend['role']} grew by {trend['growth']:.1f} MiB in {trend['steps']} steps"
    if "leak" in results and not results["leak"]["flat"]:
        yield f"memory of one process grew by {results['leak']['trend']['growth']:.1f} MiB"
    for name, outcome in results.get("disk", {}).items():
        if name == "machine":
            continue
        yield from (f"the disk that was {name}: {difference}" for difference in outcome["comparison"]["differences"])
        if not outcome["warned"]:
            yield f"the disk that was {name}: nobody was told"
        expected = 0 if name == "freed" else 2
        if outcome["exit_code"] != expected:
            yield f"the disk that was {name}: exit code {outcome['exit_code']}, not {expected}"


def _kills(found: dict[str, Any]) -> str:
    length, compared = found["steps_per_epoch"], found["comparison"]
    rows = []
    for number, kill in enumerate(found["kills"], 1):
        again = redone(kill, length)
        rows.append(
            [
                f"{number}",
                f"{kill['seconds']:,.0f}",
                _at(kill["at"]),
                _at(kill["checkpoint"]),
                "-" if again is None else f"{again}",
                _at(kill["resumed"]),
                "-" if kill["recovery"] is None else f"{kill['recovery']:.0f}",
            ]
        )
    headings = (
        "kill",
        "second",
        "epoch and step, as told",
        "newest checkpoint",
        "steps done again",
        "first told after",
        "after seconds",
    )
    seconds = found["seconds"]
    verdict = "the same, bit for bit" if not compared["differences"] else f"{len(compared['differences'])} DIFFERENCES"
    lines = (
        f"{found['steps']:,} steps in {found['epochs']} epochs on {found['workers']} workers, a checkpoint every "
        f"{found['checkpoint_every']} steps. Disturbed {seconds['disturbed'] / 60:.1f} minutes, undisturbed, at the same "
        f"time, {seconds['undisturbed'] / 60:.1f}. {len(found['kills'])} workers killed, one in each {found['kill_every']:.0f} "
        f"s; the driver failed {len(found['failures'])} times and was resumed.",
        f"{compared['tensors']} tensors ({compared['bytes'] / 2**20:.1f} MiB) of the last checkpoint and the best model, and "
        f"{compared['evaluations']} evaluations: {verdict}.",
    )
    return "\n\n".join(
        [
            "## Workers killed",
            *lines,
            _table(headings, rows),
            _peaks(found["peaks"]),
        ]
    )


def _memory(trends: list[dict[str, Any]]) -> str:
    rows = [
        [
            life["role"],
            f"{life['steps']:,}",
            f"{life['mean']:,.0f}",
            f"{life['per_1000_steps']:+.2f}",
            f"{life['private_per_1000_steps']:+.2f}",
            f"{life['growth']:+.1f}",
            "yes" if life["flat"] else "NO",
        ]
        for life in trends
    ]
    headings = ("process", "steps", "RSS, mean MiB", "RSS, MiB per 1000 steps", "private, MiB per 1000 steps")
    return _table((*headings, "most in the last third over the first, MiB", "flat"), rows)


def _peaks(peaks: dict[str, list[float]]) -> str:
    workers, others = peaks["disturbed"], peaks["undisturbed"]
    if not workers:
        return "No worker of the disturbed training lived long enough to train."
    first, last = mean(workers[:2]), mean(workers[-2:])
    return (
        f"{len(workers)} workers of the disturbed training came and went, with a peak RSS of {min(workers):,.0f} to "
        f"{max(workers):,.0f} MiB each; the first two {first:,.0f} MiB, the last two {last:,.0f} MiB. Those of the undisturbed "
        f"one had {min(others):,.0f} to {max(others):,.0f} MiB."
    )


def _leak(found: dict[str, Any]) -> str:
    (few, many), trend = found["steps"], found["trend"]
    rows = [
        [f"{steps:,}", f"{found['rss'][number]:,.1f}", f"{found['private'][number]:,.1f}"]
        for number, steps in enumerate((few, many))
    ]
    line = (
        f"In between {trend['per_1000_steps']:+.2f} MiB RSS and {trend['private_per_1000_steps']:+.2f} MiB private memory per "
        f"1000 steps: {'flat' if found['flat'] else 'NOT FLAT'}."
    )
    return "\n\n".join(["## Memory of one process", _table(("after steps", "RSS, MiB", "private, MiB"), rows), line])


def _workers(found: dict[str, Any]) -> str:
    return "\n\n".join([f"## Memory of workers in {found['steps']:,} steps", _memory(found["memory"])])


def _disk(found: dict[str, Any]) -> str:
    rows = []
    for name in ("freed", "full"):
        outcome = found[name]
        rows.append(
            [
                "freed while training went on" if name == "freed" else "full until training ended, then resumed",
                _at(outcome["filled_at"]),
                _at(outcome["kept"]),
                _at(outcome["went_on_to"]),
                f"{outcome['exit_code']}",
                "the same" if not outcome["comparison"]["differences"] else "DIFFERENT",
            ]
        )
    headings = ("disk", "full from", "whole checkpoint then", "went on to", "exit code", "in the end, against undisturbed")
    said = f"Said at the end on the full disk:\n\n```\n{found['full']['message']}\n```"
    return "\n\n".join(["## Full disk", _table(headings, rows), said])


def _machine(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "ray", "python"))
    return f"{machine['date']}, {machine['cores']} cores, load average {machine['load']} at the end; {packages}."


def _at(at: Sequence[int] | None) -> str:
    return "-" if at is None else f"{at[0]}, {at[1]}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
