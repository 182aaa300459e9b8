"""A run in an object store is the same run as on a disk: trained, killed, resumed, evaluated and compared."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch

from sibra_dist.cli import main
from sibra_dist.config import to_yaml
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import TrainingError
from sibra_dist.training.checkpoint import load_newest, published
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
from sibra_dist.training.launch import Workers
from sibra_dist.training.loop import Trainer
from sibra_dist.training.profiling import read_profile
from sibra_dist.training.progress import Progress
from sibra_dist.training.ray_train import share_on_ray, start_ray, train_on_ray
from sibra_dist.training.reading import Part
from sibra_dist.training.run_folder import RunFile, RunFolder
from tests.object_store import ObjectStore
from tests.training.conftest import make_config
from tests.training.saving import require_equal
from tests.training.test_loop import start

ROOT = Path(__file__).parents[2]


def run_command(
    folder: Path, *arguments: str, program: str = "from sibra_dist.cli import main; main()"
) -> tuple[int, str, str]:
    """`sibra-dist` with arguments, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


KILLED = """
import os, signal, sys
from sibra_dist.cli import main
from sibra_dist.training.loop import Trainer

step = Trainer._step
def deadly(self, parts, number):
    if (self.position.epoch, number) == (1, 5):
        self.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, parts, number)
Trainer._step = deadly
main()
"""


def require_same_training(found: RunFolder, expected: RunFolder, digest: str) -> None:
    for folder in ("checkpoints", "best"):
        one, two = (load_newest(run.place / folder, digest) for run in (found, expected))
        assert one is not None
        assert two is not None
        assert one.position == two.position
        require_equal(one.tensors, two.tensors)


@pytest.mark.slow
def test_trained_killed_resumed_and_evaluated_from_the_command_line(
    planted: Path, tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        """The same in this process."""
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    config = make_config(planted, training__checkpoint_every=3)
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    run, local = f"{s3}/some/run", str(tmp_path / "undisturbed")
    assert run_command(tmp_path, "train", "small.yaml", "--to", run, program=KILLED)[0] == -signal.SIGKILL
    digest = open_dataset(planted).manifest.digest
    reached = load_newest(Place.at(run) / "checkpoints", digest)
    assert reached is not None
    assert (reached.position.epoch, reached.position.step) == (1, 3)

    code, out, err = call("train", "--resume", run)
    assert code == 0, err
    assert f"run folder {run}; evaluate it with `sibra-dist evaluate {run}`" in out
    assert call("train", "small.yaml", "--to", local)[0] == 0
    require_same_training(RunFolder(run), RunFolder(local), digest)
    files = Place.at(run).files()
    assert {file.partition("/")[0] for file in files} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "best",
    }
    assert len(published(RunFolder(run).checkpoints)) == 2

    for name in (run, local):
        code, out, err = call("evaluate", name)
        assert code == 0, err
        assert "test split: " in out
    assert read_evaluation(RunFolder(run), EvaluationRequest()) == read_evaluation(RunFolder(local), EvaluationRequest())
    code, out, err = call("report", run, local)
    assert code == 0, err
    assert out.split()[:4] == ["test", "split", "run", "undisturbed"]

    code, out, err = call("train", "small.yaml", "--to", run)
    assert (code, out) == (2, "")
    assert f"{run} holds a run already. Continue it with --resume {run}" in err
    code, out, err = call("evaluate", f"{s3}/nowhere")
    assert (code, out) == (2, "")
    assert f"{s3}/nowhere is not a run folder" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml", "undisturbed"]


@pytest.fixture
def cluster(s3: str) -> Iterator[str]:
    """A cluster on this machine whose processes know how to reach the store; the URI of a bucket."""
    start_ray(2)
    yield s3
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_on_workers_of_ray_a_run_in_the_store_is_trained_and_evaluated(planted: Path, cluster: str) -> None:
    config = make_config(planted, training__epochs=2)
    run = RunFolder(f"{cluster}/run")
    run.create(config, open_dataset(planted))
    told: list[Progress] = []
    train_on_ray(run, config, Workers(2, 2), told.append)
    assert [line["epoch"] for line in run.metrics()] == [1, 2]
    newest = load_newest(run.checkpoints, open_dataset(planted).manifest.digest)
    assert newest is not None
    assert newest.position.finished
    share_on_ray(run, config, partial(evaluate_run, request=EvaluationRequest()), 2)
    shared = read_evaluation(run, EvaluationRequest())
    evaluate_run(run, EvaluationRequest())
    assert read_evaluation(run, EvaluationRequest()) == shared
    left = {file.partition("/")[0] for file in run.place.files()}
    assert left - {"ray"} == {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "best", "evaluation"}

    lost = RunFolder(f"{cluster}/lost")
    config = make_config(planted, training__learning_rate=1e30)
    lost.create(config, open_dataset(planted))
    with pytest.raises(TrainingError, match="is not finite"):  # as a worker has found
        train_on_ray(lost, config, Workers(1, 1))


def test_a_store_that_refuses_for_a_while_costs_a_checkpoint(
    planted: Path, s3: str, object_store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the training nor the checkpoint before."""
    trainer = start_at(f"{s3}/run", planted)
    digest = open_dataset(planted).manifest.digest
    seen: list[tuple[int, int]] = []

    def refuse(request: str) -> str | None:
        # The checkpoint in the middle of the second epoch, not the best models between.
        refused = request.startswith("PUT") and "epoch-0001-step-00000003" in request
        return "403 Forbidden" if refused else None

    object_store.answer = refuse
    step = trainer._step

    def watched(parts: list[Part], number: int) -> torch.Tensor:
        if (trainer.position.epoch, number) == (1, 5):
            trainer.saver.wait()
            found = load_newest(trainer.run.checkpoints, digest)
            assert found is not None
            seen.append((found.position.epoch, found.position.step))
        return step(parts, number)

    trainer._step = watched  # type: ignore[method-assign]
    assert trainer.fit().finished
    assert re.search(r"epoch-0001-step-00000003-\w+ could not be written: .*ACCESS_DENIED.*; training goes on", caplog.text)
    assert seen == [(1, 0)]


def start_at(uri: str, dataset: Path, **overrides: object) -> Trainer:
    config, opened = make_config(dataset, training__checkpoint_every=3, **overrides), open_dataset(dataset)
    run = RunFolder(uri)
    run.create(config, opened)
    return Trainer(config, opened, run)


def test_evaluations_that_cannot_be_recorded_are_recorded_later(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    run.record({"steps": 1, "loss": 0.5})
    run.record({"steps": 2, "loss": 0.4})

    def full(self: RunFile, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFile, "write_text", full)
        run.record({"steps": 2, "loss": 0.3})
        run.record({"steps": 3, "loss": 0.2})
    assert caplog.text.count("No space left on device") == 2
    assert [line["loss"] for line in run.metrics()] == [0.5, 0.4]
    run.record({"steps": 4, "loss": 0.1})
    assert [line["loss"] for line in run.metrics()] == [0.5, 0.3, 0.2, 0.1]


def test_a_profile_is_written_into_the_run(planted: Path, s3: str) -> None:
    config, dataset = make_config(planted, training__epochs=1), open_dataset(planted)
    run = RunFolder(f"{s3}/run")
    run.create(config, dataset)
    Trainer(config, dataset, run, profile=True).fit()
    assert {"phases.json", "evaluation.trace.json"} <= set(run.profile.files())
    assert read_profile(run.profile)["evaluation"]["count"] == 1


def test_a_stop_is_seen_in_the_store(planted: Path, s3: str) -> None:
    run = RunFolder(f"{s3}/run")
    assert not run.stop.exists()
    run.stop.write_text("")
    assert run.stop.exists()
    run.stop.unlink()
    run.stop.unlink()
    assert not run.stop.exists()


FULL = """
import resource, sys
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import CheckpointError
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.progress import Progress
from sibra_dist.training.ray_train import share_on_ray, start_ray, train_on_ray
from sibra_dist.training.reading import Part
from sibra_dist.training.run_folder import RunFolder

folder, limit, until = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = RunFolder(folder)
config = run.config()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def stepped(epoch, step, loss):
    if (epoch, step) in ((1, 0), (until, 0)):
        trainer.saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if epoch == 1 else hard, hard))

trainer = Trainer(config, open_dataset(config.dataset), run, Callbacks(stepped=stepped))
try:
    trainer.fit()
except CheckpointError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("until", [2, 99])
def test_a_disk_that_is_full_loses_a_checkpoint_and_nothing_else(planted: Path, tmp_path: Path, until: int) -> None:
    """No file may grow beyond a size between that of the model, and that of the model with its optimizer.

    In the second epoch only: training goes on. To the end: it stops and says so, and once there is space the run continues.
    """
    start(tmp_path / "undisturbed", planted).fit()
    run = RunFolder(tmp_path / "run")
    run.create(make_config(planted), open_dataset(planted))
    sizes = [
        next((tmp_path / "undisturbed" / folder).glob("*.safetensors")).stat().st_size for folder in ("best", "checkpoints")
    ]
    assert 1.5 * sizes[0] < sizes[1]
    code, out, err = run_command(tmp_path, str(run.path), str(sum(sizes) // 2), str(until), program=FULL)
    digest = open_dataset(planted).manifest.digest
    assert re.search(r"epoch-0002-step-00000000-\w+ could not be written: .*File too large.*; training goes on", err)
    assert not [file for file in run.place.files() if "partial" in file or ("epoch-0002" in file and "checkpoints" in file)]
    if until == 99:
        assert code == 2
        assert re.search(r"epoch-0003-step-00000000-\w+ could not be written: .*File too large", out)
        kept = load_newest(run.checkpoints, digest)
        assert kept is not None
        assert kept.position.epoch == 1
        assert start(run.path, planted).fit().finished
    else:
        assert code == 0, err
    require_same_training(run, RunFolder(tmp_path / "undisturbed"), digest)
