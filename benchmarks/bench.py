"""What is measured side by side, in processes of their own, and kept so that an interrupted benchmark goes on."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sibra_dist
from sibra_dist.data.storage import write_atomically

ROOT = Path(__file__).parents[1]
MEMORY = "peak_rss_mebibytes"


@dataclass(frozen=True)
class Contender:
    """One program in one setting. It takes `--seconds S` if its part has seconds, `--result FILE`, and its arguments.

    It tells figures by name. Where `X_per_second` has an `X_per_processor_second` beside it, both are compared.
    """

    setting: str
    name: str
    program: tuple[str, ...]
    """such as `-m MODULE`, for the interpreter"""
    arguments: tuple[str, ...]
    threads: int
    python: str = sys.executable

    @property
    def key(self) -> tuple[str, str]:
        """Setting and name, which no other of its part has."""
        return self.setting, self.name


@dataclass(frozen=True)
class Ratio:
    """How a figure of one contender compares with that of another."""

    what: str
    figure: str
    above: tuple[str, str]
    """setting and name"""
    below: tuple[str, str]
    target: float | None = None


@dataclass(frozen=True)
class Part:
    """Contenders that are measured in turns."""

    contenders: Sequence[Contender]
    repeats: int = 3
    seconds: float | None = 5.0
    """that steps are timed for, at least; None where the arguments say how much there is to do"""
    ratios: Sequence[Ratio] = field(default=())


Kept = dict[str, Any]
"""Of one contender: `setting`, `name`, `asked` (its command) and `runs`, what each repeat told."""
Found = dict[str, Any]
"""Of one part: `contenders` (`Kept`), and once it is complete `ratios` and `machine`."""


class Ledger:
    """What was measured, in a file."""

    def __init__(self, path: Path) -> None:
        """Open the file, or begin it."""
        self.path = path
        self.parts: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {}

    def begin(self, name: str, part: Part) -> list[Kept]:
        """What is kept of each contender of a part: no runs where there are none, or where another command made them."""
        before = {(kept["setting"], kept["name"]): kept for kept in self.parts.get(name, {}).get("contenders", [])}
        contenders = []
        for contender in part.contenders:
            asked = [*contender.program, *contender.arguments, f"{contender.threads} threads"]
            asked += [] if part.seconds is None else [f"{part.seconds} seconds"]
            kept = before.get((contender.setting, contender.name), {})
            fresh = {"setting": contender.setting, "name": contender.name, "asked": asked, "runs": []}
            contenders.append(kept if kept.get("asked") == asked else fresh)
        self.parts[name] = {"contenders": contenders}
        return contenders

    def conclude(self, name: str, part: Part, machine: Mapping[str, Any]) -> None:
        """Compare what was measured of a part."""
        kept = {(kept["setting"], kept["name"]): kept for kept in self.parts[name]["contenders"]}
        ratios = []
        for ratio in part.ratios:
            above, below = kept[ratio.above], kept[ratio.below]
            found = {"what": ratio.what, "ratio": _ratio(above, below, ratio.figure), "target": ratio.target}
            by_processor = ratio.figure.replace("_per_second", "_per_processor_second")
            first = above["runs"][0], below["runs"][0]
            same_ranks = first[0].get("ranks", 1) == first[1].get("ranks", 1)
            if by_processor != ratio.figure and all(by_processor in run for run in first) and same_ranks:
                found["by_processor"] = _ratio(above, below, by_processor)
            ratios.append(found)
        self.parts[name] |= {"ratios": ratios, "machine": dict(machine)}
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_atomically(self.path, json.dumps(self.parts, indent=1).encode() + b"\n")


def measure(name: str, part: Part, ledger: Ledger, work: Path) -> None:
    """Run what has not been run: every contender once, then every one again, so that a disturbance meets them all."""
    kept = ledger.begin(name, part)
    for repeat in range(part.repeats):
        for contender, mine in zip(part.contenders, kept, strict=True):
            if len(mine["runs"]) <= repeat:
                print(f"{name}: {contender.setting}, {contender.name}, {repeat + 1} of {part.repeats}", flush=True)
                mine["runs"].append(_run(contender, part.seconds, work))
                ledger.save()


def _run(contender: Contender, seconds: float | None, work: Path) -> dict[str, Any]:
    """What a contender tells.

    Raises:
        SystemExit: it failed; the message says where to look.
    """
    result, log = work / "result.json", work / "contenders.log"
    result.unlink(missing_ok=True)
    measured = (*(() if seconds is None else ("--seconds", str(seconds))), "--result", str(result))
    command = [contender.python, *contender.program, *measured, *contender.arguments]
    with log.open("ab") as output:
        status = subprocess.run(command, cwd=work, env=_environment(contender), stdout=output, stderr=output, check=False)
    if status.returncode or not result.exists():
        raise SystemExit(f"{' '.join(command)} ended with {status.returncode}; see {log}")
    told: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return told


def _environment(contender: Contender) -> Mapping[str, str]:
    threads = {f"{library}_NUM_THREADS": str(contender.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    return os.environ | threads | {"PYTHONPATH": str(ROOT)}


def _ratio(above: Kept, below: Kept, figure: str) -> float:
    over, under = median(above, figure), median(below, figure)
    assert over is not None
    assert under is not None
    return over / under


def median(kept: Kept, figure: str) -> float | None:
    """Of a figure over the repeats; None where it is not told."""
    values = [run[figure] for run in kept["runs"] if figure in run]
    return statistics.median(values) if values else None


def record(ledger: Ledger, markdown: str, path: Path, work: Path) -> None:
    """Write all figures to `path`, and as tables to the file of Markdown beside it."""
    # Without the place of the work folder, which is this machine's alone.
    text = json.dumps(ledger.parts, indent=1).replace(f"{work}/", "")
    write_atomically(path, text.encode() + b"\n")
    write_atomically(path.with_suffix(".md"), markdown.encode())


def machine() -> dict[str, Any]:
    """What figures depend on."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sibra-dist": sibra_dist.__version__,
    }
