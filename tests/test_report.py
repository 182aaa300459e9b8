"""What a person reads: the tables, and the lines that tell of progress where there is no terminal."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from sibra_dist import terminal
from sibra_dist.config import to_yaml, validate
from sibra_dist.data.manifest import Manifest, Records
from sibra_dist.data.presence import describe_hide
from sibra_dist.errors import CheckpointError
from sibra_dist.report import (
    comparison_table,
    dataset_table,
    evaluation_table,
    training_summary,
    trials_table,
)
from sibra_dist.terminal import counting, duration, progress_bar, stages
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.progress import Progress
from sibra_dist.training.run_folder import RunFolder
from tests.planted import write_planted


def shown(what: RenderableType, width: int = 120) -> list[str]:
    """The lines as they are printed, without the blanks at their ends."""
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    console.print(what, soft_wrap=True)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def cells(lines: Sequence[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def write_run(
    folder: Path,
    metrics: dict[str, float] | None = None,
    dataset: str = "a",
    lines: Sequence[dict[str, Any]] = (),
    hide: dict[str, float] | None = None,
    candidates: str = "split",
) -> Path:
    """A run folder with a configuration, an evaluation of the test split if `metrics` are given, and what it recorded."""
    folder.mkdir(parents=True)
    evaluation = {"hide": hide or {}, "candidates": candidates}
    config = validate(TrainConfig, {"dataset": "somewhere", "model": {"type": "pop"}, "evaluation": evaluation}, where="test")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if metrics is not None:
        (folder / "evaluation" / "test").mkdir(parents=True)
        told = {"dataset": dataset, "candidates": candidates, "hidden": describe_hide(hide or {})}
        result = {**told, "metrics": {f"test/{name}": value for name, value in metrics.items()}}
        name = "metrics-all-items" if candidates == "all" else "metrics"
        name = "-".join([f"{name}-without", *told["hidden"]]) if hide else name
        (folder / "evaluation" / "test" / f"{name}.json").write_text(json.dumps(result))
    return folder


def test_a_dataset_is_told_with_what_became_of_its_records(tmp_path: Path) -> None:
    manifest = Manifest.read(write_planted(tmp_path / "dataset", users=1200, items=60, per_user=10))
    records = Records(
        read=12345, rejected={"no user id": 2, "no item id": 1}, filtered={"min_rating": 342, "core": 0}, kept=12000
    )
    manifest = manifest.model_copy(
        update={"records": records, "rejected_side_information": {"duplicate id": 1, "unknown id": 3}}
    )
    counts = manifest.counts
    lines = shown(dataset_table(manifest, Path("data/planted")))
    assert lines[:4] == [
        "dataset planted in data/planted: 1,200 users, 60 items, split cold_item (seed 0)",
        f"interactions: {counts.train:,} train ({counts.train / 12000:.1%}), {counts.validation:,} validation "
        f"({counts.validation / 12000:.1%}), {counts.test:,} test ({counts.test / 12000:.1%})".replace("%", " %"),
        "records: 12,345 read, 3 rejected (2 no user id, 1 no item id), 342 left out (342 min_rating), 12,000 kept",
        "side information: 4 records rejected (1 duplicate id, 3 unknown id)",
    ]
    assert cells(lines[4:]) == [
        "side feature kind size present share unknown values".split(),
        "users club category 4 1,028 85.7 % 0 (no code)".split(),
        "items tags tags 5 48 80.0 % 0 (no code)".split(),
        "items cover vector 6 50 83.3 % -".split(),
    ]


def test_a_dataset_is_told_by_the_place_that_was_asked_for(tmp_path: Path) -> None:
    manifest = Manifest.read(write_planted(tmp_path / "dataset"))
    assert shown(dataset_table(manifest, "s3://bucket/a"))[0].startswith("dataset planted in s3://bucket/a: 60 users, ")


def test_a_dataset_without_features_has_no_table_of_them(tmp_path: Path) -> None:
    manifest = Manifest.read(write_planted(tmp_path / "dataset", features=False))
    lines = shown(dataset_table(manifest, tmp_path))
    assert len(lines) == 3
    assert lines[-1] == "records: 720 read, 0 rejected, 0 left out, 720 kept"


def test_a_training_is_told_by_its_best_evaluation(tmp_path: Path) -> None:
    values = (0.1, 0.3, 0.2)
    lines = [{"epoch": epoch, "val/ndcg@10": value} for epoch, value in enumerate(values, start=1)]
    run = write_run(tmp_path / "run", lines=lines)
    assert shown(training_summary(RunFolder(run)), width=20) == [  # nothing is wrapped: the command is there to be copied
        "trained 3 epochs; best val/ndcg@10 0.3000 after epoch 2",
        f"run folder {run}; evaluate it with `sibra-dist evaluate {run}`",
    ]


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        ({"peak_rss_mebibytes": 1234}, "peak of a rank: 1,234 MiB in memory, mapped files included"),
        (
            {"peak_rss_mebibytes": 900, "peak_gpu_mebibytes": 20000},
            "peak of a rank: 900 MiB in memory, mapped files included, 20,000 MiB on its GPU",
        ),
    ],
)
def test_a_training_is_told_with_its_peak_of_memory(tmp_path: Path, memory: dict[str, int], told: str) -> None:
    run = write_run(tmp_path / "run", lines=[{"epoch": 1, "val/ndcg@10": 0.5, "memory": memory}])
    assert shown(training_summary(RunFolder(run)))[1] == told


def evaluation(**changes: Any) -> dict[str, Any]:
    counts = {
        "users": 1234,
        "users_without_relevant": 0,
        "candidates": 80,
        "users_without_modality": 0,
        "items_without_modality": 0,
    }
    metrics = {"test/ndcg@5": 0.25, "test/ndcg@10": 0.33336, "test/coverage@5": 1.0, "test/coverage@10": 0.0}
    return {"split": "test", "hidden": [], "counts": {**counts, **changes.pop("counts", {})}, "metrics": metrics, **changes}


def test_an_evaluation_has_a_row_a_metric_and_a_column_a_cutoff() -> None:
    note, *table = shown(evaluation_table(evaluation()))
    assert note == "test split: 1,234 users, 80 candidates each"
    assert cells(table) == [["metric", "@5", "@10"], ["test/ndcg", "0.2500", "0.3334"], ["test/coverage", "1.0000", "0.0000"]]


def test_a_metric_without_a_cutoff_has_a_column_of_its_own() -> None:
    metrics = {"test/ndcg@5": 0.25, "test/auc": 0.75, "test/gini@5": 0.125}
    assert cells(shown(evaluation_table(evaluation(metrics=metrics)))[1:]) == [
        ["metric", "@5", "all"],
        ["test/ndcg", "0.2500"],
        ["test/auc", "0.7500"],
        ["test/gini", "0.1250"],
    ]


def test_an_evaluation_says_what_was_hidden_and_who_was_left_with_nothing() -> None:
    counts = {"users_without_relevant": 3, "items_without_modality": 2000}
    note = shown(evaluation_table(evaluation(hidden=["items.cover", "items.tags"], counts=counts)))[0]
    assert note == (
        "test split, without items.cover, items.tags: 1,234 users, 80 candidates each; "
        "3 users without relevant; 2,000 items without modality"
    )


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"ndcg@10": 0.5, "ndcg@5": 0.4, "recall@10": 0.25})
    two = write_run(tmp_path / "two", {"ndcg@10": 0.125, "mrr@10": 1.0})
    assert cells(shown(comparison_table([one, two]))) == [
        ["test", "split", "one", "two"],
        ["ndcg@10", "0.5000", "0.1250"],
        ["recall@10", "0.2500", "-"],
        ["mrr@10", "-", "1.0000"],
    ]


def test_a_run_whose_evaluation_hides_something_says_so_beside_one_that_sees_all(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"ndcg@10": 0.5})
    two = write_run(tmp_path / "two", {"ndcg@10": 0.125}, hide={"items.tags": 0.5, "items.cover": 1.0})
    assert cells(shown(comparison_table([one, two])))[1:] == [
        ["without", "-", "items.cover,", "items.tags=0.5"],
        ["ndcg@10", "0.5000", "0.1250"],
    ]


def test_a_run_that_ranks_all_items_says_so_beside_one_that_ranks_those_of_the_split(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"ndcg@10": 0.5})
    two = write_run(tmp_path / "two", {"ndcg@10": 0.125}, candidates="all")
    assert cells(shown(comparison_table([one, two])))[1] == ["candidates", "split", "all", "items"]


def test_runs_without_the_usual_metrics_are_compared_by_their_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"ndcg@50": 0.5, "recall@50": 0.25})
    assert cells(shown(comparison_table([run])))[1:] == [["ndcg@50", "0.5000"], ["recall@50", "0.2500"]]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(Path(path), {"ndcg@10": value}) for path, value in (("a/run", 0.1), ("b/run", 0.2), ("b/other", 0.3))]
    assert cells(shown(comparison_table(runs))) == [
        ["test", "split", "a/run", "b/run", "other"],
        ["ndcg@10", "0.1000", "0.2000", "0.3000"],
    ]


def test_many_runs_are_told_apart_and_every_figure_is_whole(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"sibrar-cold-item-20260101-1200{n:02}", {"precision@10": n / 100}) for n in range(12)]
    lines = shown(comparison_table(runs))
    assert cells(lines)[-1] == ["precision@10", *(f"{n / 100:.4f}" for n in range(12))]
    assert "…" not in "".join(lines)


def test_runs_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", {"ndcg@10": 0.5}), write_run(tmp_path / "two", {"ndcg@10": 0.5}, dataset="b")
    with pytest.raises(CheckpointError, match="different datasets"):
        comparison_table([one, two])
    three = write_run(tmp_path / "three")
    with pytest.raises(CheckpointError, match=r"three has no evaluation of the test split: run `sibra-dist evaluate .*three`"):
        comparison_table([one, three])
    with pytest.raises(CheckpointError, match="nothing is not a run folder"):
        comparison_table([tmp_path / "nothing"])


def test_trials_are_listed_with_what_was_searched() -> None:
    search = {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "model.type": {"choice": ["pop", "random"]}}
    values = {"dataset": "somewhere", "model": {"type": "pop"}, "tune": {"search": search}}
    trials: list[dict[str, Any]] = [
        {"name": "b", "value": 0.5, "epochs": 3, "settings": {"training.learning_rate": 0.00123456, "model.type": "pop"}},
        {"name": "a", "value": None, "epochs": 0, "settings": {"training.learning_rate": 0.01, "model.type": "random"}},
    ]
    assert cells(shown(trials_table(trials, validate(TrainConfig, values, where="test")))) == [
        ["trial", "val/ndcg@10", "epochs", "training.learning_rate", "model.type"],
        ["b", "0.5000", "3", "0.001235", "pop"],
        ["a", "failed", "0", "0.01", "random"],
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (0.4, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.6, "1:00:00"), (3723, "1:02:03"), (360000, "100:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What goes to standard error, which is no terminal here, line by line."""
    file = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=file, width=40, force_terminal=False, markup=False, emoji=False))
    return lambda: file.getvalue().splitlines()


def progress(**changes: Any) -> Progress:
    values = {
        "epoch": 1,
        "epochs": 3,
        "step": 5,
        "steps": 10,
        "loss": 0.5,
        "monitor": "val/ndcg@10",
        "metric": None,
        "evaluated": 0,
        "best": None,
        "examples_per_second": 12345.6,
        "seconds_left": 61.0,
    }
    return Progress(**{**values, **changes})


def test_without_a_terminal_counting_is_a_line_a_tenth(output: Callable[[], list[str]]) -> None:
    with counting("recommending to", "users") as show:
        for done in (0, 99, 100, 150, 450, 2000):
            show(done, 2000)
    assert output() == [f"recommending to: {done} of 2,000 users" for done in ("450", "2,000")]


def test_without_a_terminal_progress_is_a_line_an_evaluation(output: Callable[[], list[str]]) -> None:
    with progress_bar() as show:
        for step in (3, 6, 9):
            show(progress(step=step))
        assert output() == []
        show(progress(epoch=2, step=0, metric=0.25, evaluated=1, best=0.25))
        for step in (3, 6, 9):
            show(progress(epoch=2, step=step, metric=0.25, evaluated=1, best=0.25))
        show(progress(epoch=3, step=0, loss=0.125, metric=0.125, evaluated=2, best=0.25, seconds_left=5))
        show(progress(epoch=3, step=0, loss=0.0625, metric=0.5, evaluated=3, best=0.5, seconds_left=0))
    assert output() == [
        "epoch 1/3  loss 0.5000  val/ndcg@10 0.2500 (best 0.2500)  12,346 examples/s  at most 1:01 left",
        "epoch 2/3  loss 0.1250  val/ndcg@10 0.1250 (best 0.2500)  12,346 examples/s  at most 0:05 left",
        "epoch 3/3  loss 0.0625  val/ndcg@10 0.5000 (best 0.5000)  12,346 examples/s  at most 0:00 left",
    ]


def test_a_speed_that_was_not_measured_is_not_told(output: Callable[[], list[str]]) -> None:
    with progress_bar() as show:
        show(progress(metric=0.25, evaluated=1, best=0.25, examples_per_second=0.0, seconds_left=1e15))
    assert output() == ["epoch 1/3  loss 0.5000  val/ndcg@10 0.2500 (best 0.2500)"]


def test_without_a_terminal_each_stage_is_a_line(output: Callable[[], list[str]]) -> None:
    with stages("fetching") as begin:
        begin("trying https://an.address.that.is/longer/than/the/terminal/is/wide[1].zip")
        begin("done")
    assert output() == [
        "fetching: trying https://an.address.that.is/longer/than/the/terminal/is/wide[1].zip",
        "fetching: done",
    ]


def test_on_a_terminal_stages_and_training_show_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    shown_at = Console(file=file, width=200, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(terminal, "errors", shown_at)
    with stages("preparing", ("read", "write")) as begin:
        begin("read")
        begin("[/write]")
    with progress_bar() as show:
        show(progress(epoch=2, metric=0.25, evaluated=1, best=0.25))
    text = file.getvalue()
    assert "preparing: [/write]" in text
    assert "epoch 2/3" in text
    assert "5/10" in text
    assert "val/ndcg@10 0.2500 (best 0.2500)" in text
