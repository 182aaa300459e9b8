"""A training by the command line, watched from outside; its workers may be killed, and it is resumed if it fails."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.training.soak.processes import Sample, kill_one, sample, workers_of
from sibra_dist.training.checkpoint import published, step_of
from sibra_dist.training.run_folder import RunFolder

EVERY = 2.0
"""Seconds between two looks"""
MOST_RESTARTS = 20
At = tuple[int, int]
"""Epoch and step"""


@dataclass
class Kill:
    """A worker that was killed."""

    seconds: float
    """Since the training began"""
    rank_of_age: int
    """Which worker it was, by the order of their process numbers"""
    at: At | None
    """Where training was, as last told, at most a second before; None: it had told nothing yet"""
    checkpoint: At | None
    """The newest that was published then"""
    resumed: At | None = None
    """What new workers told first, which is where they began or a little further"""
    recovery: float | None = None
    """Seconds until they told it"""


@dataclass
class Course:
    """How a training went."""

    seconds: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    """Exit codes of drivers that failed, after each of which the run was resumed"""
    samples: list[Sample] = field(default_factory=list)


def kill_times(every: float, seed: int) -> Iterator[float]:
    """A random moment in each stretch of `every` seconds."""
    draws, begin = random.Random(seed), 0.0
    while True:
        yield begin + draws.uniform(0.0, every)
        begin += every


class Training:
    """One training, in a driver process of its own."""

    def __init__(self, run: Path, arguments: Sequence[str], workers: int, log: Path, threads: int = 1) -> None:
        """Describe a training in the folder `run`, which is new, with the command line's `arguments`."""
        self.run, self.log = RunFolder(run), log
        self._arguments, self._workers = list(arguments), workers
        self._environment = os.environ | {"OMP_NUM_THREADS": f"{threads}"}

    def start(self) -> subprocess.Popen[bytes]:
        """Start its driver; or resume it, if it has been started before."""
        what = ["--resume", self.run.name] if self.run.exists else [*self._arguments, "--to", self.run.name]
        command = [sys.executable, "-m", "sibra_dist.cli", "train", *what, "--workers", f"{self._workers}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment)

    def told(self) -> At | None:
        """The step that the workers are in, as they last told; None if they have told nothing."""
        try:
            progress = json.loads(self.run.progress.read_text())
        except (OSError, ValueError):
            return None
        epoch, step = int(progress["epoch"]) - 1, int(progress["step"])
        # Epochs are shown from 1, and behind the last one it is still shown.
        is_done = step == 0 and progress["evaluated"] > epoch
        return (epoch + 1 if is_done else epoch), step

    def saved(self) -> At | None:
        """Where the newest published checkpoint is."""
        names = published(self.run.checkpoints)
        return step_of(names[0]) if names else None


def follow(
    training: Training,
    steps_per_epoch: int,
    kills: Iterable[float] = (),
    seed: int = 0,
    halted: threading.Event | None = None,
) -> Course:
    """Train to the end, killing workers at the times given; a driver that fails is started again with `--resume`.

    Raises:
        SystemExit: it fails again and again, and the message says where to look; or it was halted.
    """
    course, draws, began = Course(), random.Random(seed + 1), time.monotonic()
    look = _Look(training, course, steps_per_epoch, began)
    times = iter(kills)
    due = next(times, None)
    while True:
        process = training.start()
        try:
            while not _ends_within(process, EVERY if due is None else max(min(EVERY, began + due - time.monotonic()), 0.1)):
                if halted is not None and halted.is_set():
                    raise SystemExit("halted")
                look.sample(process.pid)
                if due is not None and time.monotonic() - began >= due and look.kill(process.pid, draws):
                    due = next(times, None)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode == 0:
            course.seconds = time.monotonic() - began
            return course
        course.failures.append(process.returncode)
        if len(course.failures) > MOST_RESTARTS:
            raise SystemExit(f"training failed {len(course.failures)} times; see {training.log}")


class _Look:
    """What is looked at while a driver runs."""

    def __init__(self, training: Training, course: Course, steps_per_epoch: int, began: float) -> None:
        self._training, self._course, self._began = training, course, began
        self._steps_per_epoch = steps_per_epoch
        self._steps: int | None = None
        self._dying: frozenset[int] = frozenset()
        """Workers at the time of the last kill, until others have told where they are"""
        self._stale: At | None = None
        """What was told last before there were others"""

    def sample(self, driver: int) -> None:
        """Note the memory of all, and whether new workers have resumed."""
        told, workers = self._training.told(), workers_of(driver)
        if told is not None:
            self._steps = told[0] * self._steps_per_epoch + told[1]
        if self._dying and workers and self._dying.isdisjoint(workers):
            if told is not None and told != self._stale:
                kill = self._course.kills[-1]
                kill.resumed, kill.recovery = told, self._now() - kill.seconds
                self._dying = frozenset()
        elif self._dying:
            self._stale = told
        if self._dying or not workers:
            self._steps = None
        roles = {driver: "driver", **dict.fromkeys(workers, "worker")}
        found = (sample(pid, role, self._now(), self._steps) for pid, role in roles.items())
        self._course.samples += [one for one in found if one is not None]

    def kill(self, driver: int, draws: random.Random) -> bool:
        """Kill a worker; whether there was one."""
        workers = workers_of(driver)
        at, saved = self._training.told(), self._training.saved()
        victim = kill_one(driver, draws)
        if victim is None:
            return False
        order = workers.index(victim) if victim in workers else -1
        self._course.kills.append(Kill(self._now(), order, at, saved))
        self._dying, self._stale = frozenset([*workers, victim]), at
        return True

    def _now(self) -> float:
        return time.monotonic() - self._began


def _ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
