"""Half an hour of training in which workers are killed, memory is watched, and the disk is full; Linux only.

    python -m benchmarks.training.soak [--minutes 30] [--kill-every 180] [--workers 2] [--work DIR] [--only PART...] [--record]

`kills`: two trainings of the same at the same time, of which one loses a worker to SIGKILL at a random moment of every
`--kill-every` seconds. They must end alike, bit for bit. `leak`: memory of a training in one process; `workers`: of a long
one on Ray workers. `disk`: two trainings on a file system that fills up on the way.

What a part found is kept in the work folder, and not found again. The command ends with 1 if anything was not as it should be.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.measure import sibra_dist
from benchmarks.training.soak.comparison import Comparison, compare
from benchmarks.training.soak.course import Course, Training, follow, kill_times
from benchmarks.training.soak.disk import Outcome, ends, goes_on, small_file_system
from benchmarks.training.soak.memory import peaks, trends
from benchmarks.training.soak.report import faults, markdown
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.storage import write_atomically

RECIPE = "sibrar-cold-item"
BATCH = 512
EVERY_STEPS = 25
SIZES = ("--users", "4000", "--items", "1500", "--interactions", "300000", "--evaluated-users", "300", "--cold-items", "0.1")
SETTINGS = (
    *("model.users.input_size=64", "model.items.input_size=64", "evaluation.metrics=[ndcg]", "training.device=cpu"),
    *(f"training.batch_size={BATCH}", f"training.checkpoint_every={EVERY_STEPS}", "training.patience=-1"),
)
RECOVERY_SECONDS = 30.0
"""What a kill is taken to cost when the number of epochs is chosen"""
LEAK_STEPS, LEAK_BATCH = 5000, 128
LONG_EPOCHS = 20
DISK_EPOCHS, DISK_BATCH, DISK_EVERY_STEPS = 2, 2048, 10
RECORDED = Path(__file__).parent / "results.json"


class Soak:
    """One soak, in a work folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Make the dataset."""
        self.work, self.workers = arguments.work.resolve(), arguments.workers
        self.minutes, self.kill_every, self.seed = arguments.minutes, arguments.kill_every, arguments.seed
        self.epochs = arguments.epochs
        self._halted = threading.Event()
        self.work.mkdir(parents=True, exist_ok=True)
        os.environ["SIBRA_CACHE"] = str(self.work / "cache")
        self.dataset = self.work / "dataset"
        sibra_dist("synthesize", *SIZES, "--to", str(self.dataset), log=self.work / "synthesize.log")
        self.positives: int = Manifest.read(self.dataset).counts.train
        self.steps_per_epoch = self._steps(BATCH)

    def kills(self) -> dict[str, Any]:
        """The disturbed training beside the undisturbed one."""
        epochs = self.epochs or self._epochs_that_last()
        settings = [*self._settings(epochs), "training.max_failures=-1"]
        with ThreadPoolExecutor(2) as pool:
            still = pool.submit(self._train, "undisturbed", settings)
            stretch = 60 * self.minutes
            times = takewhile(lambda time: time < stretch, kill_times(self.kill_every, self.seed))
            harmed = pool.submit(lambda: self._train("disturbed", settings, list(times)))
            try:
                courses = {"disturbed": harmed.result(), "undisturbed": still.result()}
            except BaseException:
                self._halted.set()
                raise
        for name, course in courses.items():
            self._keep_samples(name, course)
        compared = compare(self.work / "disturbed", self.work / "undisturbed")
        return {
            "minutes": self.minutes,
            "kill_every": self.kill_every,
            "workers": self.workers,
            "epochs": epochs,
            "steps": epochs * self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "checkpoint_every": EVERY_STEPS,
            "seconds": {name: course.seconds for name, course in courses.items()},
            "kills": [asdict(kill) for kill in courses["disturbed"].kills],
            "failures": courses["disturbed"].failures,
            "comparison": asdict(compared),
            "peaks": {name: peaks(course.samples, "worker") for name, course in courses.items()},
        }

    def leak(self) -> dict[str, Any]:
        """Memory of one process."""
        result, folder = self.work / "leak.json", self._new("leak")
        epochs = -(-LEAK_STEPS * LEAK_BATCH // self.positives) + 1
        settings = [*self._settings(epochs), f"training.batch_size={LEAK_BATCH}"]
        command = [sys.executable, "-m", "benchmarks.training.soak.leak", str(result), f"{LEAK_STEPS}", str(folder), RECIPE]
        with (self.work / "leak.log").open("ab") as log:
            subprocess.run([*command, *settings], check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def workers_leak(self) -> dict[str, Any]:
        """Memory of workers in a long training."""
        course = self._train("long", self._settings(LONG_EPOCHS))
        self._keep_samples("long", course)
        found = [asdict(found) | {"flat": found.is_flat} for found in trends(course.samples)]
        return {"steps": LONG_EPOCHS * self.steps_per_epoch, "memory": found}

    def disk(self) -> dict[str, Any]:
        """Two trainings on a file system that fills up."""
        settings = [
            *self._settings(DISK_EPOCHS),
            *(f"training.batch_size={DISK_BATCH}", f"training.checkpoint_every={DISK_EVERY_STEPS}"),
        ]
        self._train("reference", settings, batch=DISK_BATCH)
        disk, found = self.work / "disk", {}
        for name in ("freed", "full"):
            with small_file_system(disk):
                training = self._training(disk / "run", name, settings)
                steps = 3 * DISK_EVERY_STEPS
                outcome: Outcome = (
                    goes_on(training, disk, steps) if name == "freed" else ends(training, disk, self._steps(DISK_BATCH))
                )
                compared: Comparison = compare(disk / "run", self.work / "reference")
                message = outcome.message.replace(f"{self.work}/", "")
                found[name] = asdict(outcome) | {"message": message, "comparison": asdict(compared)}
        return found

    def _epochs_that_last(self) -> int:
        """Epochs that two trainings at a time do in the wanted minutes, less what kills cost."""
        rates: list[float] = []
        with ThreadPoolExecutor(2) as pool:
            names = ("rate-a", "rate-b")
            for name, _ in zip(names, pool.map(lambda name: self._train(name, self._settings(1)), names), strict=True):
                lines = (self.work / name / "metrics.jsonl").read_text().splitlines()
                rates.append(json.loads(lines[-1])["examples_per_second"])
        seconds = 60 * self.minutes * max(1 - RECOVERY_SECONDS / self.kill_every, 0.1)
        return max(int(seconds * min(rates) / self.positives), 1)

    def _train(self, name: str, settings: list[str], kills: Sequence[float] = (), batch: int = BATCH) -> Course:
        training = self._training(self._new(name), name, settings)
        return follow(training, self._steps(batch), kills, self.seed, self._halted)

    def _training(self, run: Path, name: str, settings: list[str]) -> Training:
        log = self.work / f"{name}.log"
        log.unlink(missing_ok=True)
        return Training(run, [RECIPE, *settings], self.workers, log)

    def _steps(self, batch: int) -> int:
        """Of an epoch."""
        return -(-self.positives // batch)

    def _keep_samples(self, name: str, course: Course) -> None:
        lines = (json.dumps(asdict(one)) for one in course.samples)
        (self.work / f"{name}-samples.jsonl").write_text("\n".join(lines))

    def _settings(self, epochs: int) -> list[str]:
        return [f"dataset={self.dataset}", *SETTINGS, f"training.epochs={epochs}", f"seed={self.seed}"]

    def _new(self, name: str) -> Path:
        folder: Path = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


PARTS = {"kills": Soak.kills, "leak": Soak.leak, "workers": Soak.workers_leak, "disk": Soak.disk}


def main() -> None:
    """Soak, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="that the disturbed training lasts, about")
    parser.add_argument("--kill-every", type=float, default=180.0, metavar="SECONDS")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of both trainings; by default as many as the minutes allow for")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings, and of the moments of the kills")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--record", action="store_true", help=f"write the results to {RECORDED.name} beside this file")
    arguments = parser.parse_args()
    # So that what it has started ends with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    soak, kept = Soak(arguments), arguments.work / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in arguments.only:
        if name not in results:
            results[name] = PARTS[name](soak) | {"machine": _machine()}
            write_atomically(kept, json.dumps(results, indent=1).encode() + b"\n")
    print(markdown(results))
    if arguments.record:
        write_atomically(RECORDED, json.dumps(results, indent=1).encode() + b"\n")
        write_atomically(RECORDED.with_suffix(".md"), markdown(results).encode())
    if found := faults(results):
        sys.exit("\n".join(["not as it should be:", *found]))


def _machine() -> dict[str, Any]:
    """What figures depend on."""
    packages = {name: version(name) for name in ("sibra-dist", "torch", "ray")}
    load = round(os.getloadavg()[2], 1)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": os.cpu_count(),
        "load": load,
        "python": platform.python_version(),
        **packages,
    }


if __name__ == "__main__":
    main()
