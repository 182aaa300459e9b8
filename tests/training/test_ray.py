"""On real Ray clusters, started on this machine and stopped by the handle that started them."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from sibra_dist.config import load_config, to_yaml
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError, ConfigError, TrainingError
from sibra_dist.training import ray_train, ray_validation
from sibra_dist.training.checkpoint import load_best, load_newest
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run
from sibra_dist.training.launch import Workers
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ray_train import share_on_ray, start_ray, train_on_ray
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.tune import search
from sibra_dist.training.validation import CandidateEvaluator, Found
from tests.training.conftest import make_config

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(4)
    yield
    ray.shutdown()


def make_run(folder: Path, config: TrainConfig) -> RunFolder:
    run = RunFolder(folder)
    run.create(config, open_dataset(config.dataset))
    return run


@pytest.fixture(scope="module")
def undisturbed(cluster: None, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of three epochs on two workers to which nothing happens."""
    config = make_config(planted, training__epochs=3, training__checkpoint_every=3)
    run = make_run(tmp_path_factory.mktemp("undisturbed") / "run", config)
    train_on_ray(run, config, Workers(2, 2))
    return run


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_is_replaced_and_the_run_ends_as_undisturbed(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: RunFolder
) -> None:
    """Rank 1 kills itself with SIGKILL in the middle of the second epoch, two steps after a checkpoint."""
    config = make_config(planted, training__checkpoint_every=3, training__epochs=3)
    marker, restarted = tmp_path / "killed", tmp_path / "restarted"
    original = ray_train._train_worker

    def killed(payload: dict[str, Any]) -> None:
        step = Trainer._step

        def deadly(self: Trainer, parts: Any, number: int) -> None:
            at = (self.position.epoch, self.position.step)
            if self.ranks.rank == 1 and not marker.exists() and at == (1, 5):
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.ranks.rank == 1 and marker.exists() and not restarted.exists():
                restarted.write_text(f"{at}")
            step(self, parts, number)

        Trainer._step = deadly  # type: ignore[method-assign]  # in the worker's own process
        original(payload)

    monkeypatch.setattr(ray_train, "_train_worker", killed)
    disturbed = make_run(tmp_path / "disturbed", config)
    train_on_ray(disturbed, config, Workers(2, 2))

    assert restarted.read_text() == "(1, 3)"  # where the last checkpoint was, not the start
    digest = open_dataset(planted).manifest.digest
    for folder in ("checkpoints", "best"):
        expected, found = (load_newest(run.path / folder, digest) for run in (undisturbed, disturbed))
        assert expected is not None
        assert found is not None
        assert found.position == expected.position
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor), name
    assert [line["val/ndcg@10"] for line in disturbed.metrics()] == [line["val/ndcg@10"] for line in undisturbed.metrics()]
    assert not disturbed.progress.exists()


@pytest.mark.usefixtures("cluster")
def test_evaluation_is_the_same_with_and_without_ray(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__epochs=1, evaluation__user_tile=9)
    run = make_run(tmp_path / "run", config)
    Trainer(config, open_dataset(planted), run).fit()
    evaluate_run(run, EvaluationRequest())
    folder = run.evaluation("test")
    alone = {name: folder.read(name) for name in folder.files()}
    assert list(alone) == ["metrics.json", "users.parquet"]
    folder.delete_all()
    share_on_ray(run, config, partial(evaluate_run, request=EvaluationRequest()), 2)
    assert {name: folder.read(name) for name in folder.files()} == alone


@pytest.mark.usefixtures("cluster")
def test_evaluation_apart_from_workers_is_as_on_them(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when what evaluates is killed at its first candidate."""
    marker = tmp_path / "killed"

    class Deadly(CandidateEvaluator):
        def evaluate(self, name: str) -> Found:
            if not marker.exists():
                marker.write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().evaluate(name)

    monkeypatch.setattr(ray_validation, "CandidateEvaluator", Deadly)
    runs = []
    for on in ("ranks", "apart"):
        config = make_config(planted, training__evaluate_on=on, training__epochs=3, training__evaluate_every_steps=6)
        runs.append(make_run(tmp_path / on, config))
        train_on_ray(runs[-1], config, Workers(2, 2))
    assert marker.read_text().startswith("epoch-0000-step-00000006-")
    kept = [
        [{key: value for key, value in line.items() if key not in ("examples_per_second", "memory")} for line in run.metrics()]
        for run in runs
    ]
    assert [line["steps"] for line in kept[1]] == [6, 12, 18, 24]
    assert kept[1] == kept[0]
    digest = open_dataset(planted).manifest.digest
    expected, found = (load_best(run.checkpoints, run.best, digest) for run in runs)
    assert expected is not None
    assert found is not None
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_room_for_evaluation_apart_is_told_at_once(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__evaluate_on="apart")
    processors = int(ray.cluster_resources()["CPU"])
    with pytest.raises(TrainingError, match=rf"^{processors + 1} CPUs are wanted, but the cluster has {processors}: "):
        train_on_ray(make_run(tmp_path / "run", config), config, Workers(processors, processors))


@pytest.mark.usefixtures("cluster")
def test_what_the_user_must_put_right_is_told_and_not_tried_again(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    original = ray_train._train_worker

    def failing(payload: dict[str, Any]) -> None:
        def refuse(self: Trainer, *arguments: object, **settings: object) -> None:
            with tries.open("a") as file:
                file.write("tried\n")
            raise CheckpointError("the disk is made of cheese")

        Trainer.__init__ = refuse  # type: ignore[assignment]
        original(payload)

    monkeypatch.setattr(ray_train, "_train_worker", failing)
    config = make_config(planted)
    with pytest.raises(CheckpointError, match=r"^the disk is made of cheese$"):
        train_on_ray(make_run(tmp_path / "run", config), config, Workers(1, 1))
    assert tries.read_text() == "tried\n"


@pytest.mark.usefixtures("cluster")
def test_a_full_disk_is_told_at_once_and_the_run_goes_on_when_there_is_space(
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    undisturbed: RunFolder,
) -> None:
    """Nothing can be written any more from the second step on, an error as little as the best model.

    What workers warn of, the driver's user hears.
    """
    config = make_config(planted, training__epochs=3, training__checkpoint_every=1)

    tries = tmp_path / "tries"
    original = ray_train._train_worker

    def on_a_full_disk(payload: dict[str, Any]) -> None:
        step, write = Trainer._step, Place.write

        def filling(self: Trainer, parts: Any, number: int) -> None:
            if number == 2:
                # What was saved before is there, whatever becomes of the rest.
                self.saver.wait()
                Place.write = full  # type: ignore[method-assign]  # in the worker's own process
                with tries.open("a") as file:
                    file.write(f"{self.ranks.rank}")
            step(self, parts, number)

        def full(self: Place, name: str, content: Any) -> None:
            if payload["run"] in str(self):
                raise OSError(28, "No space left on device", name)
            write(self, name, content)

        Trainer._step = filling  # type: ignore[method-assign]
        original(payload)

    run = make_run(tmp_path / "run", config)
    with monkeypatch.context() as patch:
        patch.setattr(ray_train, "_train_worker", on_a_full_disk)
        with pytest.raises(CheckpointError, match=r"best/epoch-0001-step-00000000-.* No space left .* resume the run"):
            train_on_ray(run, config, Workers(2, 2))
    (warned,) = (record.getMessage() for record in caplog.records if "step-00000003-" in record.getMessage())
    assert "training goes on, and the checkpoint before is kept" in warned
    assert sorted(tries.read_text()) == ["0", "1"]
    digest = open_dataset(planted).manifest.digest
    kept = load_newest(run.checkpoints, digest)
    assert kept is not None
    assert (kept.position.epoch, kept.position.step) == (0, 2)

    train_on_ray(run, config, Workers(2, 2))
    expected, found = (load_newest(folder.checkpoints, digest) for folder in (undisturbed, run))
    assert expected is not None
    assert found is not None
    assert found.position == expected.position
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_there_are_processors_is_told_at_once(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted)
    with pytest.raises(TrainingError, match=r"^999 CPUs are wanted, but the cluster has \d+: use fewer --workers"):
        train_on_ray(make_run(tmp_path / "run", config), config, Workers(999, 999))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_search_finds_the_better_setting(planted: Path, tmp_path: Path, workers: int) -> None:
    """And ASHA stops the worse one early, which runs second."""
    tune = {"search": {"training.learning_rate": {"choice": [0.03, 1e-7]}}, "method": "grid", "grace_epochs": 3, "reduction": 2}
    config = make_config(planted, training__epochs=6, tune=tune)
    told: list[str] = []
    trials = search(config, tmp_path / "search", workers, told.append)
    assert [trial["settings"]["training.learning_rate"] for trial in trials] == [0.03, 1e-7]
    assert trials[0]["value"] > trials[1]["value"]
    assert trials[0]["epochs"] == 6
    assert trials[1]["epochs"] < 6
    assert len(told) == 2
    assert (tmp_path / "search" / "trials.csv").read_text().startswith("trial,value,epochs,training.learning_rate\n")

    best = load_config(TrainConfig, tmp_path / "search" / "best.yaml")
    assert best.training.learning_rate == 0.03
    run = make_run(tmp_path / "again", best)
    Trainer(best, open_dataset(planted), run, Callbacks()).fit()
    assert max(line["val/ndcg@10"] for line in run.metrics()) == pytest.approx(trials[0]["value"], abs=1e-6)
    with pytest.raises(ConfigError, match="holds a search already"):
        search(config, tmp_path / "search")


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (None, "there is no tune section"),
        (
            {"search": {"training.learning_rat": {"choice": [1]}}},
            "unknown key training.learning_rat; did you mean learning_rate",
        ),
        ({"search": {"training.learning_rate": {"choice": [-1]}}}, "training.learning_rate: input should be greater than 0"),
        ({"search": {"seed": {"uniform": [0, 1]}}, "method": "grid"}, "a grid needs a list of choices"),
        ({"search": {"training.evaluate_on": {"choice": ["ranks", "apart"]}}}, "a search takes its decisions at once"),
    ],
)
def test_a_search_that_cannot_be_is_told_before_it_starts(planted: Path, tmp_path: Path, tune: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(make_config(planted, tune=tune), tmp_path / "search")
    assert not (tmp_path / "search").exists()


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A Ray head of its own with token authentication; yields the environment of whoever submits to it."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for probe in (one, two, three):
            probe.bind(("127.0.0.1", 0))
        port, dashboard, agent = (probe.getsockname()[1] for probe in (one, two, three))
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path must be short
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield {
                **environment,
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
                "HEAD_LOG": str(folder / "head.log"),
            }
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                # Whatever of its session is left, if anything is.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)


def submit(environment: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, followed to the end of the job; tried again while the head is still starting."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--", sys.executable, *entrypoint]
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        starting = "Failed to connect to Ray" in done.stderr or "No available agent" in done.stderr
        if not starting:
            return done


def test_a_training_submitted_through_the_jobs_api_succeeds(head: dict[str, str], planted: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(to_yaml(make_config(planted, training__epochs=1)))
    run = tmp_path / "run"
    done = submit(head, str(ROOT / "jobs/train.py"), str(tmp_path / "small.yaml"), "--workers", "1", "--to", str(run))
    assert done.returncode == 0, done.stdout + done.stderr + Path(head["HEAD_LOG"]).read_text()
    assert "succeeded" in done.stdout
    assert len(RunFolder(run).metrics()) == 1

    stranger = {**head, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = submit(stranger, str(ROOT / "jobs/train.py"), str(tmp_path / "small.yaml"), "--to", str(tmp_path / "never"))
    assert refused.returncode != 0
    assert not (tmp_path / "never").exists()

    broken = submit(head, str(ROOT / "jobs/evaluate.py"), str(tmp_path / "nothing"))
    assert broken.returncode != 0
    assert "is not a run folder" in broken.stdout
    assert "Traceback" not in broken.stdout.split("is not a run folder")[0]
