"""What may differ in how a step is computed, and what must not in what comes of it."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sibra_dist.data.dataset import open_dataset
from sibra_dist.training.checkpoint import load_newest
from sibra_dist.training.loop import Trainer
from sibra_dist.training.profiling import PROFILED, WARM_UP, read_profile
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config

WITHOUT_NORMALISATION = {"model__users__batch_norm_every": -1, "model__items__batch_norm_every": -1}


def train(folder: Path, planted: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, and the tensors of the last checkpoint."""
    config = make_config(planted, **settings)
    run, dataset = RunFolder(folder), open_dataset(planted)
    run.create(config, dataset)
    losses: list[float] = []
    Trainer(config, dataset, run, Callbacks(stepped=lambda epoch, step, loss: losses.append(loss))).fit()
    checkpoint = load_newest(run.checkpoints, dataset.manifest.digest)
    assert checkpoint is not None
    return losses, checkpoint.tensors


def test_reading_ahead_changes_no_bit(planted: Path, tmp_path: Path) -> None:
    losses, tensors = train(tmp_path / "at once", planted, training__read_ahead=False)
    ahead, others = train(tmp_path / "ahead", planted, training__read_ahead=True)
    assert ahead == losses
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training__sampler": {"type": "in_batch", "pool": 8}, "training__loss": "sampled_softmax"},
        {"training__examples": "users", "training__loss": "sampled_softmax", "training__batch_size": 16},
    ],
    ids=["pairs", "pool", "users"],
)
def test_a_step_in_parts_is_the_whole_step(planted: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Batch normalisation apart, whose statistics are a part's own, but for rounding; the last step is a short one."""
    settings = {**WITHOUT_NORMALISATION, "training__batch_size": 50, **settings}
    if "training__examples" in settings:  # its contrast is of the users that are seen at once
        settings["model__items__contrast"] = None
    whole, _ = train(tmp_path / "whole", planted, **settings)
    parts, _ = train(tmp_path / "parts", planted, training__accumulate=3, **settings)
    assert len(whole) > 6
    assert parts == pytest.approx(whole, rel=1e-4)


def test_bfloat16_is_close_and_keeps_parameters_in_float32(planted: Path, tmp_path: Path) -> None:
    full, _ = train(tmp_path / "full", planted)
    half, tensors = train(tmp_path / "half", planted, training__precision="bfloat16")
    assert half != full
    assert half == pytest.approx(full, rel=0.1)
    assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if tensor.is_floating_point())


@pytest.mark.filterwarnings("ignore")  # those of torch.compile about itself
def test_compiled_layers_compute_the_same(planted: Path, tmp_path: Path) -> None:
    eager, _ = train(tmp_path / "eager", planted, training__epochs=1)
    compiled, _ = train(tmp_path / "compiled", planted, training__epochs=1, training__compile=True)
    assert compiled == pytest.approx(eager, rel=1e-2)


def test_evaluation_by_steps(planted: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", planted, training__epochs=2, training__evaluate_every_steps=3)
    lines = RunFolder(tmp_path / "run").metrics()
    steps = lines[-1]["steps"]
    assert [line["steps"] for line in lines] == [*range(3, steps, 3), steps]
    assert [line["epoch"] for line in lines] == [line["steps"] // (steps // 2) for line in lines]
    assert all("val/ndcg@10" in line and "loss" in line for line in lines)


def test_a_run_that_died_between_evaluations_by_steps_goes_on_to_the_same_end(planted: Path, tmp_path: Path) -> None:
    config = make_config(planted, training__epochs=2, training__evaluate_every_steps=3, training__patience=3)
    runs = [RunFolder(tmp_path / name) for name in ("undisturbed", "interrupted")]
    dataset = open_dataset(planted)
    for run in runs:
        run.create(config, dataset)
    Trainer(config, dataset, runs[0]).fit()

    def die(epoch: int, step: int, loss: float) -> None:
        if (epoch, step) == (1, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, dataset, runs[1], Callbacks(stepped=die)).fit()
    Trainer(config, dataset, runs[1]).fit()
    first, second = ([{**line, "examples_per_second": 0} for line in run.metrics()] for run in runs)
    assert first == second


def test_a_profile_has_traces_and_the_time_of_each_phase(
    planted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(planted, training__batch_size=16, training__epochs=1)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(planted)
    run.create(config, dataset)
    losses: list[float] = []
    callbacks = Callbacks(stepped=lambda epoch, step, loss: losses.append(loss))
    Trainer(config, dataset, run, callbacks, profile=True).fit()
    assert len(losses) > WARM_UP + PROFILED
    profile = read_profile(run.profile)
    assert profile["steps"]["count"] == PROFILED
    assert {"batch", "encode", "score", "backward", "communicate", "optimise"} <= profile["steps"]["seconds"].keys()
    assert profile["evaluation"]["count"] == 1
    assert "evaluate" in profile["evaluation"]["seconds"]
    assert all(seconds > 0 for part in ("steps", "evaluation") for seconds in profile[part]["seconds"].values())
    trace = json.loads(run.profile.read("steps.trace.json"))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("backward") == PROFILED
    assert run.profile.read("evaluation.trace.json")
    assert capfd.readouterr() == ("", "")
    undisturbed, _ = train(tmp_path / "undisturbed", planted, training__batch_size=16, training__epochs=1)
    assert losses == undisturbed


def test_reading_ahead_leaves_no_thread_behind_when_training_stops(planted: Path, tmp_path: Path) -> None:
    def die(epoch: int, step: int, loss: float) -> None:
        raise KeyboardInterrupt

    config = make_config(planted, training__read_ahead=True)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(planted)
    run.create(config, dataset)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, dataset, run, Callbacks(stepped=die)).fit()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
