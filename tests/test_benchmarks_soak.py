"""The soak's parts: whom it kills, what it calls flat and the same, how it follows a driver. All of it takes half an hour."""

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from benchmarks.training.soak import course as following
from benchmarks.training.soak.comparison import compare, same_bits
from benchmarks.training.soak.course import Training, follow, kill_times
from benchmarks.training.soak.disk import full, small_file_system
from benchmarks.training.soak.leak import growth
from benchmarks.training.soak.memory import peaks, trend, trends
from benchmarks.training.soak.processes import Sample, descendants, kill_one, sample, workers_of
from benchmarks.training.soak.report import faults, markdown, redone
from sibra_dist.data.dataset import open_dataset
from sibra_dist.training.loop import Trainer
from sibra_dist.training.run_folder import RunFolder
from tests.planted import write_planted
from tests.training.conftest import make_config

DRIVER = """
import subprocess, sys
children = [subprocess.Popen(["sleep", "600"])]
children += [subprocess.Popen([title, "600"], executable="/bin/sleep") for title in sys.argv[1:]]
print("ready", flush=True)
sys.stdin.read()
for child in children:
    child.kill()
    child.wait()
"""


@contextmanager
def driver(*titles: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child without a title and one for each title; they end with the block."""
    with subprocess.Popen([sys.executable, "-c", DRIVER, *titles], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process


def test_only_workers_of_the_driver_are_killed() -> None:
    titles = ("ray::RayTrainWorker", "ray::RayTrainWorker.run_train_fn", "ray::TrainController")
    with driver(*titles) as mine, driver("ray::RayTrainWorker") as other:
        everyone = descendants(mine.pid)
        assert len(everyone) == 4
        assert set(everyone) < set(descendants(os.getpid()))
        workers = workers_of(mine.pid)
        assert len(workers) == 2
        killed: set[int | None] = set()
        while workers_of(mine.pid):  # one that was killed may run a moment longer
            killed.add(kill_one(mine.pid, Random(0)))
        assert killed - {None} == set(workers)
        assert kill_one(mine.pid, Random(0)) is None, "there is none left"
        assert set(descendants(mine.pid)) == set(everyone) - set(workers)
        assert len(workers_of(other.pid)) == 1


def test_a_moment_is_drawn_in_each_stretch() -> None:
    times = list(islice(kill_times(180.0, seed=1), 50))
    assert [int(time // 180) for time in times] == list(range(50))
    within = [time % 180 for time in times]
    assert min(within) < 30
    assert max(within) > 150
    assert times == list(islice(kill_times(180.0, seed=1), 50))
    assert times != list(islice(kill_times(180.0, seed=2), 50))


def test_memory_of_a_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sample(os.getpid(), "alone", 0.0, 0)
    # Its own pages: the heap may have as much to give.
    block = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    after = sample(os.getpid(), "alone", 1.0, 1)
    assert before is not None
    assert after is not None
    assert after.private - before.private == pytest.approx(len(block) / 2**20, abs=4)
    assert after.rss >= after.private
    with driver() as process:
        pass
    assert sample(process.pid, "alone", 0.0, 0) is None


def life(sizes: list[float], *, pid: int = 1, steps: int = 100, role: str = "worker") -> list[Sample]:
    return [Sample(pid, role, 2.0 * number, number * steps, size, size / 2) for number, size in enumerate(sizes)]


def test_memory_that_grows_is_not_flat() -> None:
    noise = Random(0)
    # It grows while it warms up in either case.
    start = [100.0 + 10 * number for number in range(20)]
    steady = trend(life(start + [300 + noise.uniform(-1, 1) for _ in range(60)]))
    leaking = trend(life(start + [300 + 0.1 * number + noise.uniform(-1, 1) for number in range(60)]))
    assert steady is not None
    assert leaking is not None
    assert steady.is_flat
    assert abs(steady.per_1000_steps) < 0.2
    assert not leaking.is_flat
    assert leaking.per_1000_steps == pytest.approx(1.0, rel=0.2)
    assert leaking.private_per_1000_steps == pytest.approx(0.5, rel=0.2)
    shrinking = trend(life([500.0 - number for number in range(80)]))
    assert shrinking is not None
    assert shrinking.is_flat
    sawtooth = trend(life(start + [300.0 + 40 * (number % 2) for number in range(60)]))
    assert sawtooth is not None
    assert sawtooth.is_flat, "copies come and go"


def test_short_lives_have_a_peak_and_no_trend() -> None:
    starting = Sample(3, "worker", 0.0, None, 900.0, 900.0)
    samples = [*life([100.0] * 90), *life([100.0, 120.0, 110.0], pid=2), starting, *life([5.0] * 90, pid=4, role="driver")]
    assert [found.role for found in trends(samples)] == ["worker", "driver"]
    assert peaks(samples, "worker") == [100.0, 120.0], "one that never trained has none"
    assert trend(life([100.0] * 90, steps=10)) is None


def test_growth_of_one_process_is_from_a_fifth_of_the_steps() -> None:
    found = growth(life([100.0] * 50 + [200.0] * 450, steps=10))
    assert found["steps"] == [990, 4990]
    assert found["rss"] == [200.0, 200.0]
    assert found["flat"]
    assert not growth(life([100.0 + number for number in range(500)]))["flat"]


def test_bits_are_compared() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert same_bits(torch.tensor(3), torch.tensor(3))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bits(torch.zeros(2, 1), torch.zeros(2))
    assert not same_bits(torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: `one` and `two` of the same, and `other` of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = write_planted(folder / "dataset", protocol="random")
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        config = make_config(dataset, seed=seed, training__epochs=2)
        run = RunFolder(folder / name)
        run.create(config, open_dataset(dataset))
        Trainer(config, open_dataset(dataset), run).fit()
    return folder


def test_runs_are_the_same_or_not(runs: Path) -> None:
    same = compare(runs / "one", runs / "two")
    assert same.differences == []
    assert same.evaluations == 2
    assert same.steps > 2
    assert same.bytes > 1000
    differing = compare(runs / "one", runs / "other").differences
    assert sum(difference.startswith("newest checkpoint: model/") for difference in differing) > 5
    assert any(difference.startswith("evaluation ") for difference in differing)


class Scripted(Training):
    """Its driver is a script: the first one fails when its worker is killed, the next one succeeds."""

    def start(self) -> subprocess.Popen[bytes]:
        self.run.place.path.mkdir(exist_ok=True)
        worker = "import subprocess; done = subprocess.run(['ray::RayTrainWorker', '600'], executable='/bin/sleep')"
        script = f"{worker}; raise SystemExit(3 if done.returncode == {-signal.SIGKILL} else 4)"
        if self.run.progress.exists():
            script = "pass"
        self.run.progress.write_text(json.dumps({"epoch": 2, "step": 7, "evaluated": 1.0}))
        return subprocess.Popen([sys.executable, "-c", script])


def test_a_driver_that_fails_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "EVERY", 0.1)
    training = Scripted(tmp_path / "run", [], 2, tmp_path / "log")
    course = follow(training, 10, kills=[0.0])
    assert course.failures == [3]
    assert [(kill.at, kill.checkpoint) for kill in course.kills] == [((1, 7), None)]
    assert {one.role for one in course.samples} == {"driver", "worker"}
    assert {one.steps for one in course.samples} <= {17, None}


def test_where_training_is_as_told(tmp_path: Path) -> None:
    training = Training(tmp_path, [], 2, tmp_path / "log")
    assert training.told() is None
    assert training.saved() is None
    for told, at in (((1, 5, 0.0), (0, 5)), ((2, 0, 1.0), (1, 0)), ((2, 0, 2.0), (2, 0))):
        epoch, step, evaluated = told
        training.run.progress.write_text(json.dumps({"epoch": epoch, "step": step, "evaluated": evaluated}))
        assert training.told() == at


def test_a_disk_is_full_and_free_again(tmp_path: Path) -> None:
    try:
        with small_file_system(tmp_path / "disk", 1 << 20):
            check_full(tmp_path / "disk")
    except SystemExit as refused:
        pytest.skip(str(refused))
    assert list((tmp_path / "disk").iterdir()) == [], "it is unmounted"


def check_full(disk: Path) -> None:
    with full(disk, 64 << 10):
        (disk / "small").write_bytes(b"x" * 1000)
        with pytest.raises(OSError, match="No space left"):
            (disk / "large").write_bytes(b"x" * (128 << 10))
    (disk / "large").write_bytes(b"x" * (128 << 10))
    with full(disk, 0), pytest.raises(OSError, match="No space left"):
        (disk / "other").write_bytes(b"x" * 5000)


def results(**changes: Any) -> dict[str, Any]:
    compared = {"steps": 100, "tensors": 3, "bytes": 1 << 20, "evaluations": 2, "differences": []}
    kill = {"seconds": 61.0, "rank_of_age": 1, "at": [1, 7], "checkpoint": [1, 5], "resumed": [1, 6], "recovery": 9.0}
    machine = {"date": "2026-01-02", "cores": 2, "load": 1.0, "python": "3", "torch": "2", "ray": "2", "sibra-dist": "1"}
    found = trend(life([100.0] * 90))
    assert found is not None
    peaks = {"disturbed": [700.0, 710.0], "undisturbed": [705.0]}
    outcome: dict[str, Any] = {
        "comparison": compared,
        "filled_at": [0, 5],
        "kept": [0, 5],
        "went_on_to": None,
        "message": "error: full",
        "warned": True,
    }
    whole: dict[str, Any] = {
        "kills": {
            **{"minutes": 30.0, "kill_every": 180.0, "workers": 2, "epochs": 2, "steps": 100, "steps_per_epoch": 50},
            **{"checkpoint_every": 5, "seconds": {"disturbed": 1800.0, "undisturbed": 1500.0}, "kills": [kill], "failures": []},
            **{"comparison": compared, "peaks": peaks, "machine": machine},
        },
        "leak": growth(life([100.0] * 500)) | {"machine": machine},
        "workers": {"steps": 9000, "memory": [vars(found) | {"flat": True}], "machine": machine},
        "disk": {"freed": outcome | {"exit_code": 0}, "full": outcome | {"exit_code": 2}, "machine": machine},
    }
    whole = json.loads(json.dumps(whole))  # so that no two of its parts are one
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = whole
        for parent in parents:
            place = place[int(parent) if parent.isdecimal() else parent]
        place[last] = value
    return whole


def test_what_is_not_as_it_should_be_is_told() -> None:
    assert faults(results()) == []
    text = markdown(results())
    assert "| 1 | 61 | 1, 7 | 1, 5 | 2 | 1, 6 | 9 |" in text
    assert "the same, bit for bit" in text
    assert text.endswith("All as it should be.\n")
    for changes, said in (
        ({"kills__comparison__differences": ["model/x differs"]}, "model/x differs"),
        ({"kills__kills": []}, "no worker was killed"),
        ({"kills__kills__0__resumed": [0, 49]}, "before its checkpoint"),
        ({"workers__memory__0__flat": False}, "memory of a worker grew"),
        ({"leak__flat": False}, "memory of one process grew"),
        ({"disk__full__exit_code": 1}, "exit code 1, not 2"),
        ({"disk__freed__exit_code": 2}, "exit code 2, not 0"),
        ({"disk__freed__warned": False}, "nobody was told"),
    ):
        (fault,) = faults(results(**changes))
        assert said in fault
        assert fault in markdown(results(**changes))


def test_steps_done_again_are_counted_over_epochs() -> None:
    assert redone({"at": [2, 3], "checkpoint": [1, 45]}, 50) == 8
    assert redone({"at": None, "checkpoint": [1, 45]}, 50) is None
