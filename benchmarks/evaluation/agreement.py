"""Whether contenders that do the same find the same."""

from collections.abc import Mapping
from typing import Any

from benchmarks.bench import Found, Kept
from benchmarks.evaluation.parts import DIFFERENT

TOLERANCE = 1e-5
"""Peers compute in float32; ours are exact to 7e-12."""


def differences(found: Found) -> list[dict[str, Any]]:
    """By setting, peer and metric, how far the peer is from ours on the same users at the cutoff where that is most.

    Raises:
        SystemExit: two differ that have one definition, or have nothing in common.
    """
    ours = {kept["setting"]: kept for kept in found["contenders"] if kept["name"] == "ours"}
    rows = []
    for kept in found["contenders"]:
        own, its = _metrics(ours[kept["setting"]], kept), kept["runs"][0]["metrics"]
        common = [name for name in its if name in own]
        if not common:
            raise SystemExit(f"{kept['setting']}: {kept['name']} and ours have no metric in common")
        for metric in dict.fromkeys(name.partition("@")[0] for name in common):
            most = max(abs(its[name] - own[name]) / max(abs(own[name]), 1e-9) for name in common if _is(name, metric))
            why = DIFFERENT.get((kept["name"], metric))
            if most > TOLERANCE and why is None:
                raise SystemExit(f"{kept['setting']}: {metric} of {kept['name']} differs from ours by {most:.2g} of it")
            rows.append({"setting": kept["setting"], "name": kept["name"], "metric": metric, "most": most, "why": why})
    return rows


def _is(name: str, metric: str) -> bool:
    return name.partition("@")[0] == metric


def _metrics(ours: Kept, other: Kept) -> Mapping[str, float]:
    """Ours for the users of the other."""
    run = ours["runs"][0]
    found: Mapping[str, float] = run["metrics"]
    if "prefixes" in run:
        found = run["prefixes"][str(other["runs"][0]["users"])]
    return found
