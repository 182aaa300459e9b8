"""What every measured program takes and tells. Of the standard library only: peers in environments of their own use it too."""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def rates(what: str, count: int, wall: float, processor: float) -> dict[str, Any]:
    """What so many of something took: seconds of the clock and of processors, and this process' peak RSS."""
    return {
        f"{what}_per_second": count / wall,
        f"{what}_per_processor_second": count / processor,
        "processors": processor / wall,
        "peak_rss_mebibytes": peak_rss(),
    }


def peak_rss() -> float:
    """MiB of this process that were in memory at most. `getrusage` would count the process that started it as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def contender(description: str | None, *, timed: bool = True) -> argparse.ArgumentParser:
    """The options of every measured program, `--seconds` only for those that are `timed` for so long."""
    parser = argparse.ArgumentParser(description=description)
    if timed:
        parser.add_argument("--seconds", type=float, required=True, help="at least so long, after the warm-up")
    parser.add_argument("--result", type=Path, required=True, help="the file that tells what came out")
    return parser


def tell(path: Path, result: dict[str, Any]) -> None:
    """Write what came out, whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(result))
    os.replace(scratch, path)
