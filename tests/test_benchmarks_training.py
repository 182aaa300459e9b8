"""What the benchmark of training compares is the same, and what it times and tells is right."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks import environments
from benchmarks.bench import Contender, Ledger, Part, Ratio, machine, measure
from benchmarks.environments import Environment, interpreter
from benchmarks.experiment import Laboratory
from benchmarks.training import dense_training, ours, pace, parts, quality
from benchmarks.training.dense import DenseBatch, DenseSibrar
from benchmarks.training.dense_training import Pairs, inputs_of
from benchmarks.training.parts import PARTS, Workshop
from benchmarks.training.report import markdown
from sibra_dist.config import load_config
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import open_dataset
from sibra_dist.models import build_model
from sibra_dist.models.base import parameter_count
from sibra_dist.models.branch import BatchNorm
from sibra_dist.models.single_branch import SingleBranch, SingleBranchConfig
from sibra_dist.training.batching import batch_losses
from sibra_dist.training.config import TrainConfig
from tests.planted import write_planted

MODALITIES = ("interactions", "tags", "cover")


class Both:
    """Ours and the dense one, with the same parameters, on the same dataset."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.dataset = open_dataset(write_planted(folder))
        config = load_config(
            TrainConfig,
            "sibrar-cold-item",
            [
                f"dataset={folder}",
                f"model.items.modalities=[{', '.join(MODALITIES)}]",
                "model.items.contrast.weight=0.5",
                "model.users.input_dropout=0",
                "model.items.input_dropout=0",
                *settings,
            ],
        )
        assert isinstance(config.model, SingleBranchConfig)
        self.ours = cast(SingleBranch, build_model(config.model, self.dataset, 1))
        self.dense = DenseSibrar(inputs_of(self.dataset, MODALITIES), config.model, len(self.dataset.training_items))
        self.batches = Batches(self.dataset, *self.ours.sampling(), seed=2, batch_size=32, negatives=4)
        with torch.no_grad():
            for mine, its in self.pairs():
                its.copy_(as_in_dense(mine, its))

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters and running statistics of ours, and those of the dense one."""
        users, items = self.ours.users.encoders["interactions"], self.ours.items.encoders
        pairs = [
            (users.table.weight, self.dense.user_interactions.weight),
            (users.bias, self.dense.user_interactions.bias),
            (items["interactions"].table.weight, self.dense.item_interactions.weight),
            (items["interactions"].bias, self.dense.item_interactions.bias),
            (cast(nn.Embedding, items["tags"].embedding).weight, self.dense.item_tags.weight),
            (cast(nn.Linear, items["cover"].linear).weight, self.dense.item_vector.weight),
            (cast(nn.Linear, items["cover"].linear).bias, self.dense.item_vector.bias),
        ]
        branches = ((self.ours.user_branch, self.dense.user_branch), (self.ours.item_branch, self.dense.item_branch))
        for mine, its in branches:
            ours = {name: value for name, value in mine.layers.state_dict(keep_vars=True).items() if "seen" not in name}
            both = zip(ours.values(), its.state_dict(keep_vars=True).values(), strict=True)
            pairs += [(own, dense) for own, dense in both if own.is_floating_point()]
        return cast(list[tuple[Tensor, Tensor]], pairs)

    def losses(self, step: int) -> tuple[Tensor, Tensor]:
        batch = self.batches.batch(0, step)
        output = self.ours(batch)
        losses = batch_losses("sampled_softmax", batch, output.scores) + sum(output.auxiliary_losses.values())
        return (losses * batch.weights).sum() / batch.total_weight, self.dense(dense_batch(batch))


def as_in_dense(mine: Tensor, its: Tensor) -> Tensor:
    """A table of ours, of which inputs select rows, is the weight of a linear layer transposed."""
    return mine if mine.shape == its.shape else mine.T


def dense_batch(batch: TrainBatch) -> DenseBatch:
    return DenseBatch(batch.users, batch.items, batch.item_modalities)


@pytest.mark.parametrize("exclude_target", ["true", "false"])
def test_the_dense_model_has_our_loss_and_gradients(tmp_path: Path, exclude_target: str) -> None:
    """Without batch normalisation: its statistics are of distinct rows in ours, of occurrences in the other."""
    without = ("model.users.batch_norm_every=-1", "model.items.batch_norm_every=-1", f"model.exclude_target={exclude_target}")
    both = Both(tmp_path / "dataset", *without)
    batch = both.batches.batch(0, 0)
    assert set(batch.item_modalities.unique().tolist()) == {-1, 0, 1, 2}, "every case is in it"
    mine, its = both.losses(0)
    torch.testing.assert_close(its, mine)
    mine.backward()
    its.backward()
    for own, other in both.pairs():
        torch.testing.assert_close(other.grad, as_in_dense(cast(Tensor, own.grad), other), atol=1e-6, rtol=1e-4)


def test_with_given_statistics_of_batch_normalisation_the_losses_are_equal_too(tmp_path: Path) -> None:
    both = Both(tmp_path / "dataset")
    for step in range(3):  # gather some
        both.losses(step)
    with torch.no_grad():
        for mine, its in both.pairs():
            its.copy_(as_in_dense(mine, its))
        for norm in both.ours.modules():
            if isinstance(norm, BatchNorm):
                norm.seen.fill_(1)  # then ours takes them as they are, as PyTorch's does from the first step on
    both.ours.eval()
    both.dense.eval()
    mine, its = both.losses(3)
    torch.testing.assert_close(its, mine)


def test_the_dense_one_draws_as_we_do(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    pairs = Pairs(dataset, MODALITIES, draws=2, negatives=5)
    batch = pairs[list(range(len(pairs)))]
    torch.testing.assert_close(batch.users * dataset.items.count + batch.items[:, 0], pairs.known)
    histories = dataset.users.histories
    known = [set(histories.indices[histories.indptr[user] : histories.indptr[user + 1]].tolist()) for user in range(60)]
    trained = set(dataset.training_items.tolist())
    for user, negatives in zip(batch.users.tolist(), batch.items[:, 1:].tolist(), strict=True):
        assert trained.issuperset(negatives)
        assert not known[user].intersection(negatives)
    first, second = batch.drawn.unbind(-1)
    assert bool((first != second).all())
    present = pairs.present[batch.items]
    for drawn in (first, second):
        assert bool((present.gather(-1, drawn.clamp(min=0)[..., None]).squeeze(-1) | (drawn == -1)).all())
    torch.testing.assert_close((batch.drawn != -1).sum(-1), present.sum(-1).clamp(max=2))


class Clock:
    """Stands in for `time`: tells what it is set to."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.processor

    def pass_by(self, wall: float, processor: float) -> None:
        self.wall += wall
        self.processor += processor


def test_pace_leaves_out_the_warm_up_and_what_is_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    timed = pace.Pace(seconds=7)
    enough = []
    for number in range(pace.WARM_UP + 5):
        clock.pass_by(100, 100)
        timed.rest()
        clock.pass_by(50 if number < pace.WARM_UP else 2, 1)
        enough.append(timed.step(positives=10))
    told = timed.result()
    assert enough == [False] * (pace.WARM_UP + 3) + [True, True], "four steps of two seconds are the first to be enough"
    assert told["steps"] == 5
    assert told["step_seconds"] == 2
    assert told["positives_per_second"] == pytest.approx(5)
    assert told["positives_per_processor_second"] == pytest.approx(10)
    assert told["processors"] == pytest.approx(0.5)
    assert told["peak_rss_mebibytes"] > 10


@pytest.mark.parametrize("program", [ours, dense_training])
def test_programs_tell_what_they_timed(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = write_planted(tmp_path / "dataset"), tmp_path / "result.json"
    options = ["--seconds", "0.1", "--result", str(result), "sibrar-cold-item", f"dataset={folder}"]
    settings = [f"model.items.modalities=[{', '.join(MODALITIES)}]", "training.batch_size=64"]
    monkeypatch.setattr(sys, "argv", ["program", *options, *settings])
    program.main()
    told = json.loads(result.read_text())
    assert told["steps"] >= pace.LEAST
    assert 0 < told["positives_per_second"] <= 64 * told["steps"] / 0.1
    assert told["threads"] == torch.get_num_threads()


def test_both_programs_have_as_many_parameters(tmp_path: Path) -> None:
    both = Both(tmp_path / "dataset")
    # Ours has a learned input besides, for users and for items that have no modality.
    of_dense = sum(parameter.numel() for parameter in both.dense.parameters())
    assert parameter_count(both.ours) == of_dense + 2 * both.ours.config.items.input_size


def test_time_to_quality_ends_with_the_first_evaluation_that_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(quality, "time", clock)
    curve = quality.Curve("ndcg@10")
    clock.pass_by(1000, 0)
    curve.start()
    for steps, value in ((10, 0.1), (20, 0.2), (30, 0.15), (40, 0.3)):
        clock.pass_by(5, 0)
        curve.stepped(0, steps - 1, 0.0)
        clock.pass_by(2, 0)
        curve.evaluated({"steps": steps, "val/ndcg@10": value})
    assert curve.reached(0.1) == {"seconds": 7, "steps": 10}
    assert curve.reached(0.15) == {"seconds": 14, "steps": 20}
    assert curve.reached(0.25) == {"seconds": 28, "steps": 40}
    assert curve.reached(0.31) is None
    assert curve.evaluating == 8


def test_time_to_quality_is_told_of_a_whole_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = write_planted(tmp_path / "dataset"), tmp_path / "result.json"
    common = ["--seconds", "0", "--result", str(result), "--thresholds", "0", "1.5", "--seeds", "3", "4"]
    options = [*common, "--", "sibrar-cold-item", f"dataset={folder}"]
    monkeypatch.setattr(sys, "argv", ["program", *options, "training.epochs=2", "training.batch_size=200"])
    quality.main()
    told = json.loads(result.read_text())
    first, second = told["best"]
    assert first != second
    assert told["evaluations"] == [2, 2]
    assert told["reached"]["0"]["steps"] == 3
    assert told["reached"]["1.5"] is None


def test_time_to_quality_ends_when_there_is_nothing_left_to_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = write_planted(tmp_path / "dataset"), tmp_path / "result.json"
    options = ["--seconds", "0", "--result", str(result), "--thresholds", "0", "--seeds", "3", "--", "mf", f"dataset={folder}"]
    monkeypatch.setattr(sys, "argv", ["program", *options, "training.epochs=90", "training.batch_size=200"])
    quality.main()
    assert json.loads(result.read_text())["evaluations"] == [1]


def test_of_several_seeds_the_median_is_told() -> None:
    early, late = {"seconds": 2.0, "steps": 9}, {"seconds": 3.0, "steps": 1}
    assert quality.middle([late, None, early]) == late
    assert quality.middle([None, early, early]) == early
    assert quality.middle([None, late, None]) is None
    assert quality.middle([None, early]) is None


PROGRAM = """
import json, os, sys
told = json.loads(sys.argv[sys.argv.index("--result") + 2])
with open("calls", "a") as file:
    file.write(f"{sys.argv[-1]} {os.environ['OMP_NUM_THREADS']}\\n")
told["positives_per_second"] += len(open("calls").readlines())
open(sys.argv[sys.argv.index("--result") + 1], "w").write(json.dumps(told))
"""


def fake(name: str, rate: float, threads: int = 1) -> Contender:
    told = {"positives_per_second": rate, "positives_per_processor_second": rate, "processors": 1.0}
    told |= {"peak_rss_mebibytes": 5.0, "threads": threads, "parameters": 7}
    return Contender("batch 1", name, ("-c", PROGRAM), (json.dumps(told), name), threads)


def test_contenders_take_turns_and_are_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    a, b = fake("a", 100), fake("b", 10, threads=2)
    ratio = Ratio("rate of a over b", "positives_per_second", ("batch 1", "a"), ("batch 1", "b"), target=3)
    measure("engine", Part([a, b], repeats=1), Ledger(path), tmp_path)
    assert "engine" in Ledger(path).parts
    assert "batch 1" not in markdown(Ledger(path).parts), "it is not complete"
    ledger = Ledger(path)
    part = Part([a, b], repeats=3, ratios=[ratio])
    measure("engine", part, ledger, tmp_path)
    assert (tmp_path / "calls").read_text().split() == ["a", "1", "b", "2"] * 3
    ledger.conclude("engine", part, machine())
    # The program's rate grows by its calls so far.
    expected = {"what": "rate of a over b", "ratio": pytest.approx(103 / 14), "target": 3, "by_processor": 10}
    assert ledger.parts["engine"]["ratios"] == [expected]
    shown = markdown(Ledger(path).parts)
    assert "| batch 1 | a | 1 | 3 | 103 | 101 to 105 |  | 5 | 1.00 | 100 |" in shown
    assert "| rate of a over b | 7.36 | 10 | at least 3 |" in shown
    other = fake("b", 20, threads=2)
    measure("engine", Part([a, other], repeats=1), ledger, tmp_path)
    assert (tmp_path / "calls").read_text().split()[-2:] == ["b", "2"], "another command is measured anew, and only it"
    assert len((tmp_path / "calls").read_text().splitlines()) == 7


def test_a_contender_that_fails_ends_the_benchmark_and_keeps_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    broken = Contender("batch 1", "broken", ("-c", "raise SystemExit(3)"), (), 1)
    with pytest.raises(SystemExit, match=r"ended with 3; see .*contenders\.log"):
        measure("engine", Part([fake("a", 1), broken]), Ledger(path), tmp_path)
    a, b = Ledger(path).parts["engine"]["contenders"]
    assert (len(a["runs"]), b["runs"]) == (1, [])


def test_an_environment_is_made_once_and_anew_for_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    status = [0]

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        (tmp_path / "some").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, status[0])

    monkeypatch.setattr(environments.subprocess, "run", run)
    old, new = (Environment("some", (f"library=={version}",)) for version in (1, 2))
    for environment in (old, old, new):
        assert interpreter(environment, tmp_path) == tmp_path / "some" / "bin" / "python"
    assert [command[-1] for command in commands] == [str(tmp_path / "some"), "library==1", str(tmp_path / "some"), "library==2"]
    status[0] = 1
    for _ in range(2):  # what failed is not taken for made
        with pytest.raises(SystemExit, match=r"some\.log"):
            interpreter(old, tmp_path)


def test_every_contender_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their settings are valid, and what is compared is there; the measuring itself takes minutes, and is recorded."""
    (tmp_path / "interactions.tsv").touch()
    monkeypatch.setattr(Laboratory, "dataset", Laboratory.dataset_folder)
    monkeypatch.setattr(Workshop, "synthetic", lambda shop: tmp_path)
    monkeypatch.setattr(Workshop, "interactions", lambda shop: tmp_path)
    monkeypatch.setattr(parts, "interpreter", lambda environment, folder: Path(environment.name))
    shop = Workshop(tmp_path, tmp_path / "work", 1)
    for make in PARTS.values():
        part = make(shop)
        known = {(contender.setting, contender.name) for contender in part.contenders}
        assert len(known) == len(part.contenders)
        for ratio in part.ratios:
            assert {ratio.above, ratio.below} <= known
        for contender in part.contenders:
            if contender.python == sys.executable:
                settings = [argument for argument in contender.arguments if "=" in argument]
                recipe = contender.arguments[contender.arguments.index(settings[0]) - 1]
                load_config(TrainConfig, recipe, settings)
