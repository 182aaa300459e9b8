"""How much memory this process has, and has had."""

import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

STATUS = Path("/proc/self/status")
_FIELDS = {"RssAnon": "private", "RssFile": "mapped", "VmHWM": "peak"}


class Memory(NamedTuple):
    """Bytes in main memory. Where the system does not tell them apart (it is not Linux), all are private."""

    private: int
    """this process's own"""
    mapped: int
    """of files, which the system takes back when it wants to"""
    peak: int
    """of both together, at the most so far"""


def memory() -> Memory:
    """Of this process, now."""
    found: dict[str, int] = {}
    with suppress(OSError):
        lines = [line.split() for line in STATUS.read_text().splitlines()]
        found = {_FIELDS[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line and line[0][:-1] in _FIELDS}
    if len(found) < len(_FIELDS):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Memory(peak, 0, peak)
    return Memory(**found)


def peak_memory(device: torch.device) -> dict[str, int]:
    """At the most so far, in MiB, for the record of a run: of main memory with mapped files, and of the GPU's."""
    found = {"peak_rss_mebibytes": memory().peak >> 20}
    if device.type == "cuda":
        found["peak_gpu_mebibytes"] = torch.cuda.max_memory_allocated(device) >> 20
    return found


def highest(peaks: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of what `peak_memory` says on each rank, the most."""
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}
