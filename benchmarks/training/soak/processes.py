"""The processes that a training starts, by looking at /proc; so Linux only. None but those of a given driver are touched."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.etl.measuring import field

WORKER = "ray::RayTrainWorker"
"""How the title of a process begins in which Ray Train trains."""
ENDED = "ZX"


@dataclass(frozen=True)
class Sample:
    """The memory of a process at some time."""

    pid: int
    role: str
    """`worker` or `driver`"""
    seconds: float
    """Since the training began"""
    steps: int | None
    """Of the run, as last told; None while workers start"""
    rss: float
    """MiB in main memory, pages shared with others and mapped files included"""
    private: float
    """MiB of it that are the process's own"""


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, as far as they run."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (fields := _status(int(entry))) and fields[0] not in ENDED:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, ahead = [], [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def workers_of(driver: int) -> list[int]:
    """The processes in which a driver's training runs, in the order of their numbers."""
    return sorted(pid for pid in descendants(driver) if read(pid, "cmdline").startswith(WORKER))


def kill_one(driver: int, draws: random.Random) -> int | None:
    """Kill one of a driver's workers with SIGKILL; its number, or None if there is none now."""
    workers = workers_of(driver)
    if not workers:
        return None
    victim = draws.choice(workers)
    with _held(victim) as handle:
        # Held, the number cannot pass to another process, which might have happened before.
        if handle is None or victim not in workers_of(driver):
            return None
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    return victim


def sample(pid: int, role: str, seconds: float, steps: int | None) -> Sample | None:
    """The memory of a process now; None if it is gone."""
    status = read(pid, "status")
    rss, private = (field(status, name) / 1024 for name in ("VmRSS", "RssAnon"))
    return Sample(pid, role, seconds, steps, rss, private) if rss else None


def read(pid: int, name: str) -> str:
    """A file of /proc about a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (OSError, ValueError):
        return ""


def _status(pid: int) -> list[str]:
    """State, parent, and so on: what follows the name, which may hold blanks and parentheses."""
    return read(pid, "stat").rpartition(")")[2].split()


@contextmanager
def _held(pid: int) -> Iterator[int | None]:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
