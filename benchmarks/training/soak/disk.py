"""A training whose disk is full for a while.

The run's folder lies on a file system of a few MiB in memory, which is filled while training goes on. Mounting it takes the
rights of root, which `unshare --user --mount --map-root-user` lends on most systems.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training.soak.course import EVERY, At, Training, follow
from sibra_dist.training.checkpoint import load_newest

SIZE = 64 << 20
LEFT = 64 << 10
"""Bytes left where progress can still be told, but no checkpoint written."""
PATIENCE = 900.0
"""Seconds that something may take to happen"""


@dataclass
class Outcome:
    """What came of a training whose disk was full."""

    filled_at: At
    """Where training was, as last told"""
    kept: At
    """The newest checkpoint that was published then; it can be read"""
    went_on_to: At | None
    """The furthest it told of while the disk was full"""
    exit_code: int | None
    """Of the driver, where the disk stayed full until it ended"""
    message: str
    """What it said last"""
    warned: bool
    """Whether it said that a checkpoint could not be written"""


@contextmanager
def small_file_system(folder: Path, size: int = SIZE) -> Iterator[None]:
    """A file system of `size` bytes at `folder`, inside.

    Raises:
        SystemExit: it may not be mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"a small file system cannot be mounted at {folder}: {done.stderr.strip()}. Run this as root, or within "
            "`unshare --user --mount --map-root-user`"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder: Path, left: int) -> Iterator[None]:
    """All of a file system but `left` bytes is taken, inside."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(_free(folder) - left, 1))
    try:
        yield
    finally:
        filler.unlink()


def goes_on(training: Training, disk: Path, steps: int) -> Outcome:
    """Fill the disk after the first checkpoint, free it when training is `steps` further, and train to the end."""
    process = training.start()
    try:
        _wait(lambda: training.saved() is not None, process, training)
        with full(disk, LEFT):
            filled_at, kept = training.told() or (0, 0), _readable(training)
            _wait(lambda: (training.told() or (0, 0)) >= (filled_at[0], filled_at[1] + steps), process, training)
            went_on_to = training.told()
            if training.saved() != kept:
                raise SystemExit(f"a checkpoint was published on a full disk: {training.saved()}")
        _wait(lambda: (training.saved() or kept) > kept, process, training)
        process.wait(PATIENCE)
    finally:
        _end(process)
    return Outcome(filled_at, kept, went_on_to, process.returncode, *_said(training.log))


def ends(training: Training, disk: Path, steps_per_epoch: int) -> Outcome:
    """Fill the disk after the first checkpoint until the driver ends; then free it, and resume the run to its end."""
    process = training.start()
    try:
        _wait(lambda: training.saved() is not None, process, training)
        with full(disk, 0):
            filled_at = training.told() or (0, 0)
            process.wait(PATIENCE)
            said = _said(training.log)
            kept = _readable(training)
    finally:
        _end(process)
    follow(training, steps_per_epoch)
    return Outcome(filled_at, kept, None, process.returncode, *said)


def _readable(training: Training) -> At:
    """Where the newest checkpoint is, which is read and verified."""
    found = load_newest(training.run.checkpoints, training.run.dataset_digest())
    if found is None:
        raise SystemExit(f"{training.run.name} has no checkpoint")
    return found.position.epoch, found.position.step


def _wait(happened: Callable[[], bool], process: subprocess.Popen[bytes], training: Training) -> None:
    limit = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None or time.monotonic() > limit:
            raise SystemExit(f"training ended, or got stuck, before its disk was full or free again; see {training.log}")
        time.sleep(EVERY / 10)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _said(log: Path) -> tuple[str, bool]:
    """The last line, and whether there is a warning of a checkpoint."""
    text = log.read_text(errors="replace")
    # A console breaks lines.
    return (text.splitlines() or [""])[-1], "could not be written" in " ".join(text.split())
