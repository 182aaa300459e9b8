"""Trainings as processes of their own, alone and several together, which are stopped, hang, and go on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sibra_dist.config import to_yaml
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import ConfigError, TrainingStopped
from sibra_dist.training.checkpoint import load_newest, published, step_of
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run
from sibra_dist.training.launch import Workers, read_workers, train_here
from sibra_dist.training.loop import LOOKING_STEPS, Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import StopRequest
from tests.training.conftest import make_config

ALONE = [sys.executable, "-m"]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
WAIT_SECONDS = 240


def start(launcher: list[str], *arguments: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*launcher, "sibra_dist.cli", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: "subprocess.Popen[str]", path: Path, lines: int) -> None:
    """Until a file has so many lines."""
    end = time.monotonic() + WAIT_SECONDS
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def parameters(run: RunFolder, config: TrainConfig) -> dict[str, torch.Tensor]:
    checkpoint = load_newest(run.checkpoints, open_dataset(config.dataset).manifest.digest)
    assert checkpoint is not None
    assert checkpoint.position.finished
    return checkpoint.tensors


@pytest.mark.parametrize("launcher", [ALONE, TOGETHER], ids=["alone", "two processes"])
def test_sigterm_saves_the_step_and_the_run_goes_on_to_the_same_end(launcher: list[str], planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__epochs=30, training__patience=-1, training__evaluate_every=30)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    stopped, undisturbed = RunFolder(tmp_path / "stopped"), RunFolder(tmp_path / "undisturbed")
    process = start(launcher, file, "--to", stopped.path, "training.checkpoint_every=1")
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not any(step_of(name) > (1, 0) for name in published(stopped.checkpoints)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=WAIT_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if launcher == ALONE:
        assert process.returncode == 143
    assert f"Continue it with `sibra-dist train --resume {stopped.path}`" in errors
    assert "trained 30 epochs" not in output
    for arguments in (("--resume", stopped.path), (file, "--to", undisturbed.path)):
        other = start(launcher, *arguments)
        output, errors = other.communicate(timeout=WAIT_SECONDS)
        assert other.returncode == 0, errors
        assert output.count("trained 30 epochs") == 1
    found, wanted = parameters(stopped, config), parameters(undisturbed, config)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_stops_the_run_and_is_gone_then(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__epochs=3)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(config.dataset)
    run.create(config, dataset)

    def stepped(epoch: int, step: int, loss: float) -> None:
        if (epoch, step) == (1, 2):
            run.stop.write_text("")

    stop = StopRequest(run.stop.exists, poll_seconds=0)
    trainer = Trainer(config, dataset, run, Callbacks(stepped=stepped), stop=stop)
    with pytest.raises(TrainingStopped, match=r"after step 4 of epoch 1\. Continue it with"):
        trainer.fit()
    assert not run.stop.exists()
    checkpoint = load_newest(run.checkpoints, dataset.manifest.digest)
    assert checkpoint is not None
    assert (checkpoint.position.epoch, checkpoint.position.step) == (1, 4)
    run.stop.write_text("")  # left behind by somebody: whoever continues the run wants it to go on
    train_here(run, config, dataset)
    assert run.metrics()[-1]["epoch"] == 3


@pytest.mark.parametrize("looking", [1, 5, 1000])
def test_a_request_is_heard_by_the_end_of_the_epoch_at_the_latest(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looking: int
) -> None:
    """Where a device is not waited for in each step, and steps are fewer than those between two looks."""
    monkeypatch.setitem(LOOKING_STEPS, "cpu", looking)
    config = make_config(planted)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(config.dataset)
    run.create(config, dataset)
    stop = StopRequest()
    callbacks = Callbacks(stepped=lambda epoch, step, loss: stop.ask())
    with pytest.raises(TrainingStopped):
        Trainer(config, dataset, run, callbacks, stop=stop).fit()
    trainer = Trainer(config, dataset, run)
    steps = trainer.batches.steps_per_epoch
    assert (trainer.position.epoch, trainer.position.step) == (0, {1: 2, 5: 5, 1000: steps}[looking])
    trainer.fit()
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]


def test_a_store_that_is_away_for_a_moment_stops_nothing() -> None:
    answers = iter([OSError("away"), False, True])

    def asked() -> bool:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    stop = StopRequest(asked, poll_seconds=0)
    assert [bool(stop) for _ in range(4)] == [False, False, True, True]


def test_a_checkpoint_is_written_when_the_last_one_is_too_long_ago(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__epochs=1, training__checkpoint_minutes=1e-9, training__keep_checkpoints=100)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(config.dataset)
    run.create(config, dataset)
    trainer = Trainer(config, dataset, run)
    trainer.fit()
    places = [step_of(name) for name in published(run.checkpoints)]
    assert places == [(1, 0), *((0, step) for step in range(trainer.batches.steps_per_epoch, 0, -1))]


def test_machines_that_leave_are_a_reason_for_a_checkpoint_at_once_each(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sibra_dist.training.requests.LEAVING_SECONDS", 0.0)
    config = make_config(planted, training__epochs=1, training__keep_checkpoints=100)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(config.dataset)
    run.create(config, dataset)
    asked = []

    def leaving() -> frozenset[str]:
        asked.append(True)
        return frozenset({"one"} if 3 <= len(asked) < 5 else {"one", "other"} if len(asked) >= 5 else ())

    Trainer(config, dataset, run, Callbacks(leaving=leaving)).fit()
    assert len(asked) > 6
    assert [step_of(name) for name in published(run.checkpoints)] == [(1, 0), (0, 5), (0, 3)]


HANGS = """
import signal, sys, time
from sibra_dist.cli import main
from sibra_dist.training.loop import Trainer

step = Trainer._step

def hanging(self, parts, number):
    if self.ranks.rank == 1 and (self.position.epoch, number) == (0, 3):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # hangs, but does not resist
        self.whereabouts.note("nap", 0, 3)
        time.sleep(1e6)
    step(self, parts, number)

Trainer._step = hanging
main(["train", *sys.argv[1:]])
"""


def test_a_rank_that_waits_in_vain_says_for_whom(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__rank_timeout=8)
    file, script = tmp_path / "config.yaml", tmp_path / "hangs.py"
    file.write_text(to_yaml(config))
    script.write_text(HANGS)
    command = [*TOGETHER[:-1], str(script), str(file), "--to", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=WAIT_SECONDS, check=False
    )
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: rank 0 has waited")]
    assert "in communicate of epoch 0, step 3: rank 1 is since" in told
    assert "in nap of epoch 0, step 3" in told
    # Said while there is time still as well, for NCCL ends a process without an error.
    said = " ".join(done.stderr.split())
    warned = said.index("no rank gets further: rank 0 is since")
    assert warned < said.index("error: rank 0 has waited")
    assert "in communicate of epoch 0, step 3; rank 1 is since" in said[warned:]


def test_processes_that_are_started_together_evaluate_as_one(planted: Path, tmp_path: Path) -> None:
    config, run = make_config(planted, model={"type": "pop"}), RunFolder(tmp_path / "run")
    run.create(config, open_dataset(planted))
    Trainer(config, open_dataset(planted), run).fit()
    evaluate_run(run, EvaluationRequest())
    folder = run.evaluation("test")
    alone = {name: folder.read(name) for name in folder.files()}
    folder.delete_all()
    command = [*TOGETHER, "sibra_dist.cli", "evaluate", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test split") == 1, "one of them tells of it"
    assert {name: folder.read(name) for name in folder.files()} == alone


def test_workers_are_a_number_or_two() -> None:
    assert read_workers("0") == Workers(0, 0)
    assert read_workers("3") == Workers(3, 3)
    assert read_workers("1:4") == Workers(1, 4)


@pytest.mark.parametrize("text", ["", "-1", "two", "4:1", "0:4", "1:", "1:2:3"])
def test_other_workers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        read_workers(text)
