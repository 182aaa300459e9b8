"""Runs the command line as a user would, and measures it."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """What a command took."""

    seconds: float
    peak_rss_mebibytes: float
    """Of its largest process; the workers of a Ray cluster are not among them."""
    processor_seconds: float = 0.0
    """Of it and of what it waited for"""


def sibra_dist(*arguments: str, log: Path) -> Measured:
    """Run `sibra-dist` with these arguments in a process of its own; its output goes to the end of `log`.

    Raises:
        SystemExit: it failed; the message says where to look.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-m", "sibra_dist.cli", *arguments], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"sibra-dist {' '.join(arguments)} ended with {process.returncode}; see {log}")
    return Measured(time.perf_counter() - started, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)
