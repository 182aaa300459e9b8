"""Runs a command and measures it with all the processes that it starts, by looking at /proc; so Linux only.

The command gets a session of its own, by which its processes are known, whoever their parents are. Every `EVERY` seconds the
resident sets of them all are added up; the peak is the largest sum, or the peak of one process as the system remembers it, if
that is more: between two looks there may have been more. Pages that processes share (libraries, what a fork has not touched)
count once for each. The proportional sets (PSS), which divide shared pages by those that share them, are dearer to ask for,
and hold the process up, so they are asked for so seldom that it takes a fiftieth of the time at most.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVERY = 0.1
PSS_REST = 50
PAGE = os.sysconf("SC_PAGE_SIZE")
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Usage:
    """What a command took, with all its processes. Sizes are in MiB."""

    seconds: float
    """Wall time from its start to its exit."""
    peak_rss: float
    peak_pss: float
    disk_written: float
    """What all processes wrote to files on disks, those included that were removed again."""
    processes: int
    """The most there were at once."""


class Stopwatch:
    """Times stages: call it with the name of each as it begins."""

    def __init__(self) -> None:
        """Nothing has begun."""
        self._begun: list[tuple[str, float]] = []

    def __call__(self, stage: str) -> None:
        """A stage begins, and the one before it ends."""
        self._begun.append((stage, time.perf_counter()))

    def stop(self) -> dict[str, float]:
        """Seconds of each stage, in order; the last one ends now."""
        ends = [begun for _, begun in self._begun[1:]] + [time.perf_counter()]
        seconds: dict[str, float] = {}
        for (stage, begun), end in zip(self._begun, ends, strict=True):
            seconds[stage] = seconds.get(stage, 0.0) + end - begun
        return seconds


def run_measured(module: str, *arguments: str | Path, result: Path, log: Path) -> dict[str, Any]:
    """Run a module in an interpreter of its own with `arguments` and, last, the file it tells its result in.

    Returns:
        Its result and its `Usage`, in one. The stage `start` is made longer by what no stage accounts for: the start of the
        interpreter, its imports, the exit.

    Raises:
        SystemExit: it failed; the message says where to look.
    """
    result.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *map(str, arguments), str(result)]
    with log.open("ab") as output:
        usage, status = _watch(command, output.fileno())
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}; see {log}")
    told: dict[str, Any] = json.loads(result.read_text())
    stages = told.get("stages", {})
    rest = usage.seconds - sum(stages.values())
    told["stages"] = {"start": stages.pop("start", 0.0) + rest, **stages}
    result.unlink()
    return told | asdict(usage)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Tell the measuring process what came out."""
    path.write_text(json.dumps(result))


def size_of(folder: Path) -> float:
    """MiB of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MEBIBYTE


def _watch(command: list[str], output: int) -> tuple[Usage, int]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    peak_rss = peak_pss = most = 0
    next_pss = started
    written: dict[int, int] = {}
    handle = os.pidfd_open(process.pid)
    try:
        ended = False
        while not ended:
            # Readable once the process has ended. It is looked at once more before it is reaped: what it wrote last counts.
            ended = bool(select.select([handle], [], [], EVERY)[0])
            members = session_members(process.pid)
            most = max(most, len(members))
            peak_rss = max(peak_rss, sum(map(resident, members)), *map(most_resident, members))
            written |= {member: max(written_by(member), written.get(member, 0)) for member in members}
            if (now := time.perf_counter()) >= next_pss:
                peak_pss = max(peak_pss, sum(map(proportional, members)))
                next_pss = now + PSS_REST * (time.perf_counter() - now)
    except BaseException:
        # Java and Spark's workers end by themselves once the process that started them is gone.
        process.terminate()
        process.wait()
        raise
    finally:
        os.close(handle)
    usage = Usage(
        seconds=time.perf_counter() - started,
        peak_rss=peak_rss / MEBIBYTE,
        peak_pss=peak_pss / MEBIBYTE,
        disk_written=sum(written.values()) / MEBIBYTE,
        processes=most,
    )
    return usage, process.wait()


def session_members(session: int) -> list[int]:
    """The processes of a session."""
    return [pid for pid, theirs in _sessions() if theirs == session]


def resident(pid: int) -> int:
    """Bytes of a process that are in memory, shared ones included; 0 if it is gone."""
    return int((_read(pid, "statm") or "0 0").split()[1]) * PAGE


def most_resident(pid: int) -> int:
    """The most that `resident` has ever been, as the system remembers it; 0 if it is gone."""
    return field(_read(pid, "status"), "VmHWM") * 1024


def proportional(pid: int) -> int:
    """Bytes of a process that are in memory, shared ones divided by those that share them; 0 if it is gone."""
    return field(_read(pid, "smaps_rollup"), "Pss") * 1024


def written_by(pid: int) -> int:
    """Bytes that a process has written to files on disks; 0 if it is gone."""
    return field(_read(pid, "io"), "write_bytes")


def field(text: str, name: str) -> int:
    """The number in the line `name: number` of a file of /proc; 0 if there is none."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def _sessions() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (text := _read(int(entry), "stat")):
            # The name before it may hold blanks and parentheses: state, parent, group, session follow the last one.
            yield int(entry), int(text.rpartition(")")[2].split()[3])


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (OSError, ValueError):
        return ""  # it ended meanwhile
