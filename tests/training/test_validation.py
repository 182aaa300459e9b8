"""Models are evaluated apart from the ranks: with the same results, however slow it is and whatever fails."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sibra_dist.config import to_plain
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import CheckpointError, SibraError, TrainingError, TrainingStopped
from sibra_dist.training.checkpoint import Checkpoint, load_best, load_newest, published
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import StopRequest
from sibra_dist.training.validation import CandidateEvaluator, Found, ProcessValidator, awaited
from tests.training.conftest import make_config
from tests.training.saving import ThreadRanks, on_ranks
from tests.training.test_loop import Interrupted, interrupt_at

ROOT = Path(__file__).parents[2]
STEPS = 4
"""Between two evaluations by steps: one in the middle of an epoch, and one at its end"""


@dataclass
class Here:
    """A validator in this process, which has its result after being asked for it so often."""

    folder: Path
    config: Any
    delay: int = 0
    asked: Callable[[int, int], None] = lambda candidate, poll: None
    """Called with the number of the candidate and of the poll"""
    values: list[float] | None = None
    """What it says it has found, in place of the truth"""
    started: list[str] = field(default_factory=list)
    polls: int = 0
    closed: bool = False

    def start(self, name: str) -> None:
        assert not self.closed
        self.started.append(name)
        self.polls = 0

    def poll(self, seconds: float) -> Found | None:
        self.polls += 1
        self.asked(len(self.started), self.polls)
        if self.polls <= self.delay:
            return None
        if self.values is not None:
            return {"val/ndcg@10": self.values[len(self.started) - 1]}
        return CandidateEvaluator(str(self.folder), to_plain(self.config), "cpu").evaluate(self.started[-1])

    def close(self) -> None:
        self.closed = True


def start(
    folder: Path,
    dataset: Path,
    on: str = "apart",
    callbacks: Callbacks | None = None,
    stop: StopRequest | None = None,
    here: dict[str, Any] | None = None,
    **overrides: Any,
) -> Trainer:
    """A trainer, whose validator is in this process if `here` says how it behaves."""
    config = make_config(dataset, training__evaluate_on=on, **overrides)
    run, opened = RunFolder(folder), open_dataset(dataset)
    if not run.exists:
        run.create(config, opened)
    validator = Here(folder, config, **here) if here is not None else None
    return Trainer(config, opened, run, callbacks, stop=stop, validator=validator)


def lines(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, without what depends on the machine."""
    kept = RunFolder(folder).metrics()
    return [{key: value for key, value in line.items() if key not in ("examples_per_second", "memory")} for line in kept]


def read(folder: Path, dataset: Path) -> tuple[Checkpoint, Checkpoint]:
    """The newest checkpoint of a run, and its best model."""
    digest, run = open_dataset(dataset).manifest.digest, RunFolder(folder)
    newest, best = load_newest(run.checkpoints, digest), load_best(run.checkpoints, run.best, digest)
    assert newest is not None
    assert best is not None
    return newest, best


def require_same_run(found: Path, expected: Path, dataset: Path) -> None:
    """Bit for bit the same evaluations, final state and best model; and nothing is left behind."""
    assert lines(found) == lines(expected)
    for one, other in zip(read(found, dataset), read(expected, dataset), strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in other.tensors.items():
            assert torch.equal(one.tensors[name], tensor), name
    newest = [read(folder, dataset)[0].position for folder in (found, expected)]
    assert newest[0] == newest[1]
    assert newest[0].candidate is None
    assert newest[0].finished
    kept = [len(published(RunFolder(folder).best)) for folder in (found, expected)]
    # The checkpoint before the last names a candidate too, which may have become no best model.
    assert kept[1] <= kept[0] <= kept[1] + 1


SCHEDULES: dict[str, dict[str, Any]] = {
    "epochs": {},
    "some epochs": {"training__evaluate_every": 2},
    "steps": {"training__evaluate_every_steps": STEPS, "training__checkpoint_every": 3},
}


@pytest.fixture(scope="module")
def undisturbed(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were evaluated on the ranks, by schedule."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, settings in SCHEDULES.items():
        start(folder / name, planted, "ranks", **settings).fit()
    return {name: folder / name for name in SCHEDULES}


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_apart_is_as_on_the_ranks(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], schedule: str, delay: int
) -> None:
    told: list[dict[str, float]] = []
    trainer = start(
        tmp_path / "run",
        planted,
        callbacks=Callbacks(evaluated=told.append),
        here={"delay": delay},
        **SCHEDULES[schedule],
    )
    trainer.fit()
    require_same_run(tmp_path / "run", undisturbed[schedule], planted)
    assert told == lines(tmp_path / "run")
    assert isinstance(trainer.validator, Here)
    assert trainer.validator.closed
    assert len(trainer.validator.started) == len(told)


def test_training_goes_on_while_a_candidate_is_evaluated(planted: Path, tmp_path: Path) -> None:
    """Nobody asks for the result before the next evaluation is due, or nothing is left to train."""
    seen: list[tuple[int, int, int]] = []

    def asked(candidate: int, poll: int) -> None:
        seen.append((candidate, trainer.position.epoch, trainer.position.step))

    trainer = start(tmp_path / "run", planted, here={"asked": asked})
    trainer.fit()
    steps = trainer.batches.steps_per_epoch
    assert seen == [(1, 1, steps), (2, 2, steps), (3, 3, 0)]


def test_early_stopping_stops_one_evaluation_later_with_the_same_best(planted: Path, tmp_path: Path) -> None:
    values = [0.1, 0.3, 0.2, 0.3, 0.9]
    settings: dict[str, Any] = {"training__patience": 2, "training__epochs": 10}
    position = start(tmp_path / "run", planted, here={"values": values}, **settings).fit()
    assert (position.epoch, position.best_epoch, position.best, position.finished) == (5, 2, 0.3, True)
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    newest, best = read(tmp_path / "run", planted)
    assert newest.position == position
    assert best.position.epoch == 2
    # That of the second epoch, and not of a later one, when it was judged.
    start(tmp_path / "two", planted, "ranks", training__epochs=2).fit()
    expected = read(tmp_path / "two", planted)[0]
    for name, tensor in best.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


def test_models_without_training_are_evaluated_apart_too(planted: Path, tmp_path: Path) -> None:
    for on in ("ranks", "apart"):
        start(tmp_path / on, planted, on, here={}, model={"type": "pop"}).fit()
    assert lines(tmp_path / "apart") == lines(tmp_path / "ranks")
    assert len(lines(tmp_path / "apart")) == 1


@pytest.mark.parametrize(("epoch", "step"), [(0, 2), (0, 6), (1, 0), (1, 5), (2, 7)])
@pytest.mark.parametrize("schedule", ["epochs", "steps"])
def test_a_run_that_dies_with_a_candidate_ends_as_an_undisturbed_one(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], schedule: str, epoch: int, step: int
) -> None:
    """Where it is not the last checkpoint that names it, another candidate of the same position is made."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(run, planted, callbacks=interrupt_at(epoch, step), here={}, **SCHEDULES[schedule]).fit()
    trainer = start(run, planted, here={"delay": 1}, **SCHEDULES[schedule])
    candidate = trainer.position.candidate
    trainer.fit()
    require_same_run(run, undisturbed[schedule], planted)
    assert isinstance(trainer.validator, Here)
    if candidate is not None:
        assert trainer.validator.started[0] == candidate.name
    if epoch:
        assert candidate is not None


@pytest.mark.parametrize("victim", [1, 2, 3])
@pytest.mark.parametrize("moment", ["published", "awaited"])
def test_a_run_that_dies_around_an_evaluation_ends_as_an_undisturbed_one(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], moment: str, victim: int
) -> None:
    """As soon as the candidate can be read, before there is a checkpoint that names it; or while it is waited for."""
    run = tmp_path / "run"

    def asked(candidate: int, poll: int) -> None:
        if moment == "awaited" and candidate == victim:
            raise Interrupted

    trainer = start(run, planted, here={"asked": asked})
    if moment == "published":
        assert isinstance(trainer.validator, Here)
        tell = trainer.validator.start

        def dying(name: str) -> None:
            tell(name)
            if len(trainer.validator.started) == victim:  # type: ignore[union-attr]
                raise Interrupted

        trainer.saver._published = dying
    with pytest.raises(Interrupted):
        trainer.fit()
    start(run, planted, here={}).fit()
    require_same_run(run, undisturbed["epochs"], planted)


@pytest.mark.parametrize("victim", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["epochs", "steps"])
def test_a_run_that_is_stopped_while_it_waits_ends_as_an_undisturbed_one(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], schedule: str, victim: int
) -> None:
    run, stop = tmp_path / "run", StopRequest()

    def asked(candidate: int, poll: int) -> None:
        if candidate == victim and poll == 2:
            stop.ask()

    with pytest.raises(TrainingStopped, match="asked to stop"):
        start(run, planted, stop=stop, here={"delay": 9, "asked": asked}, **SCHEDULES[schedule]).fit()
    trainer = start(run, planted, here={}, **SCHEDULES[schedule])
    assert trainer.position.candidate is not None
    trainer.fit()
    require_same_run(run, undisturbed[schedule], planted)
    assert isinstance(trainer.validator, Here)


@pytest.mark.parametrize("on", ["ranks", "apart"])
@pytest.mark.parametrize("step", [STEPS - 1, STEPS, 2 * STEPS - 1])
def test_a_run_that_is_stopped_as_an_evaluation_falls_due_makes_it_when_it_resumes(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], on: str, step: int
) -> None:
    run, stop = tmp_path / "run", StopRequest()

    def stepped(epoch: int, at: int, loss: float) -> None:
        if (epoch, at) == (0, step - 1):  # the step after is the last
            stop.ask()

    settings = SCHEDULES["steps"]
    with pytest.raises(TrainingStopped):
        start(run, planted, on, Callbacks(stepped=stepped), stop, {}, **settings).fit()
    trainer = start(run, planted, on, here={}, **settings)
    assert trainer.position.step == step + 1
    trainer.fit()
    require_same_run(run, undisturbed["steps"], planted)


def test_a_damaged_candidate_is_told_and_the_run_can_go_on_from_the_checkpoint_before(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(run, planted, callbacks=interrupt_at(2, 1), here={}).fit()
    newest = read(run, planted)[0]
    assert newest.position.candidate is not None
    for part in (run / "best").glob(f"{newest.position.candidate.name}*.safetensors"):
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"which is to be evaluated, is damaged .*Remove the newest checkpoint"):
        start(run, planted, here={}).fit()
    (run / "checkpoints" / f"{newest.name}.json").unlink()
    start(run, planted, here={}).fit()
    require_same_run(run, undisturbed["epochs"], planted)


@dataclass
class Answers:
    """A validator that gives some answers, one after the other."""

    answers: list[Found | None]

    def start(self, name: str) -> None: ...

    def poll(self, seconds: float) -> Found | None:
        return self.answers.pop(0)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("answers", "asked", "expected"),
    [
        ([None, None, {"val/x": 0.5}], None, {"val/x": 0.5}),
        ([None, CheckpointError("no such model")], None, "no such model"),
        ([None, None, None], 2, None),
        # What is there counts, for then there is nothing to wait for.
        ([{"val/x": 0.5}], 2, {"val/x": 0.5}),
    ],
)
def test_ranks_hear_the_same(answers: list[Found | None], asked: int | None, expected: object) -> None:
    """Of the validator that rank 0 has, and of whoever is asked to stop."""

    def wait(ranks: ThreadRanks) -> object:
        stop = StopRequest()
        if ranks.rank == asked:
            stop.ask()
        try:
            return awaited(Answers(list(answers)) if ranks.leads else None, ranks, stop)
        except SibraError as error:
            return str(error)

    assert on_ranks(3, wait) == [expected] * 3


class Killed(ProcessValidator):
    """One whose process is killed whenever it is waited for, so many times."""

    left = 0
    pids: list[int | None]

    def poll(self, seconds: float) -> Found | None:
        assert self._process is not None
        if self.left:
            self.left -= 1
            self._process.kill()
            self._process.join()
        return super().poll(seconds)


def killed(folder: Path, dataset: Path, times: int, **settings: Any) -> Trainer:
    """A trainer with a process of its own to evaluate, which is killed so many times."""
    trainer = start(folder, dataset, here={}, **settings)
    validator = Killed(trainer.run, trainer.settings, torch.device("cpu"))
    validator.left = times
    trainer.validator = trainer.judge._validator = validator
    trainer.saver._published = validator.start
    return trainer


def test_a_process_that_is_killed_is_replaced(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = killed(tmp_path / "run", planted, 1)
    trainer.fit()
    require_same_run(tmp_path / "run", undisturbed["epochs"], planted)
    assert caplog.text.count("now with code -9; it is started again") == 1
    assert isinstance(trainer.validator, Killed)
    assert trainer.validator._process is None


def test_a_process_that_is_killed_too_often_is_an_error_and_the_run_can_go_on(
    planted: Path, tmp_path: Path, undisturbed: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"^the process that evaluates epoch-0001.* has ended 2 times, now with code -9\. "):
        killed(run, planted, 2, training__max_failures=1).fit()
    start(run, planted, training__max_failures=1).fit()  # and in a process that nobody kills
    require_same_run(run, undisturbed["epochs"], planted)


ORPHANED = """
import os, signal, sys
import torch
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.validation import ProcessValidator

run = RunFolder(sys.argv[1])
validator = ProcessValidator(run, run.config(), torch.device("cpu"))
validator.start("no such model")
assert "damaged" in str(validator.poll(300))
print(validator._process.pid, flush=True)
sys.stdin.read(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_ends_with_the_one_that_started_it(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted, here={})
    command = [sys.executable, "-c", ORPHANED, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        handle = os.pidfd_open(int(parent.stdout.readline()))
        parent.stdin.write("x")
        parent.stdin.flush()
        assert parent.wait(60) == -signal.SIGKILL
    try:
        ended, _, _ = select.select([handle], [], [], 60)
    finally:
        os.close(handle)
    assert ended
