"""How the benchmarks on MovieLens 1M add up and show what they measured; the measuring itself takes hours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiment import MEASURED, Experiment, Laboratory, in_parallel
from benchmarks.quality.__main__ import RECORDED, main
from benchmarks.quality.entries import ENTRIES, SPLITS
from benchmarks.quality.table import BASELINES, METRICS, behind, corrected, markdown, of, spread, table
from benchmarks.studies.__main__ import STUDIES
from benchmarks.studies.answer import Answer
from sibra_dist.config import load_config, to_yaml
from sibra_dist.training.config import TrainConfig


def result(seed: int, recall: float) -> dict[str, Any]:
    metrics = dict.fromkeys(METRICS, 0.5) | {"recall@10": recall}
    return {
        "seed": seed,
        "train": {"seconds": 60.0, "peak_rss_mebibytes": 100.0},
        "evaluations": {"test": {"metrics": metrics, "counts": {}}},
    }


@pytest.mark.parametrize("name", ENTRIES)
def test_every_row_can_be_started(name: str) -> None:
    for recipe, *settings in ENTRIES[name].runs.values():
        load_config(TrainConfig, recipe, ["dataset=here", *settings])


def test_every_study_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What studies ask for is valid; what they make of it takes hours, and is recorded."""
    (tmp_path / "interactions.tsv").touch()
    asked: list[Experiment] = []

    def note(experiments: Mapping[str, Sequence[Experiment]], jobs: int) -> None:
        asked.extend(experiment for several in experiments.values() for experiment in several)
        raise InterruptedError

    laboratory = Laboratory(tmp_path, tmp_path / "work")
    monkeypatch.setattr(laboratory, "run_all", note)
    for study in STUDIES.values():
        with pytest.raises(InterruptedError):
            study(laboratory, 1)
    for experiment in asked:
        load_config(TrainConfig, experiment.recipe, ["dataset=here", *experiment.settings])
    assert len(asked) > 30


def test_a_pattern_that_no_row_fits_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "--only", "MF"])
    with pytest.raises(SystemExit):
        main()
    assert "no row is like MF; there are" in capsys.readouterr().err


def test_the_recorded_results_are_of_rows_and_seeds_that_there_are() -> None:
    for name, results in json.loads(RECORDED.read_text()).items():
        model, _, setting = name.rpartition(", ")
        recipe, *settings = ENTRIES[model].runs[setting]
        assert [made["seed"] for made in results] == list(SPLITS[setting].seeds)
        assert all((made["recipe"], made["settings"]) == (recipe, settings) for made in results), name


def test_the_recorded_tables_are_of_the_recorded_results() -> None:
    assert RECORDED.with_suffix(".md").read_text(encoding="utf-8") == markdown(json.loads(RECORDED.read_text()))


def test_differences_are_tested_in_pairs_of_seeds() -> None:
    results = {
        "SiBraR, best, warm": [result(seed, recall) for seed, recall in enumerate((0.3, 0.5, 0.4))],
        "MF, warm": [result(seed, recall) for seed, recall in enumerate((0.2, 0.38, 0.3))],
        "Pop, warm": [result(seed, recall) | {"p_users": 1e-6 * seed} for seed, recall in enumerate((0.31, 0.5, 0.41))],
    }
    difference, p, users = behind(results, "warm", "MF")
    assert difference == "+0.1067"
    # Differences .1, .12, .1: t = 16 with two degrees of freedom, .0019 in one tail, and there are nine baselines.
    assert len(BASELINES) == 9
    assert float(p) == pytest.approx(9 * 0.0019, abs=1e-3)
    assert users == ""
    # The largest of three seeds.
    assert behind(results, "warm", "Pop")[1:] == ("1.0000", "2e-05")
    assert [corrected(value) for value in (0.0, 0.01, 0.5)] == ["<1e-99", ".0900", "1.0000"]
    assert behind(results, "warm", "SiBraR, best") == ("", "", "")
    assert [row[0] for row in table(results, "warm")] == ["Pop", "MF", "SiBraR, best"]
    assert "| MF | 3 | .2933 ±.090 |" in markdown(results)
    assert of(results, "cold items", "MF") == {}


def test_a_spread_is_a_mean_and_a_deviation() -> None:
    assert spread([0.1, 0.3]) == ".2000 ±.141"
    assert spread([1.0]) == "1.0000"


def test_an_answer_is_a_table_and_a_plot_that_do_not_change(tmp_path: Path) -> None:
    answer = Answer("Title", ["share", "both"], {"0%": [".1"]}, "recall", (0.0, 0.5), {"both": [[0.1, 0.3], [0.2]]}, "share")
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        answer.write(folder, "study")
        written.append([(folder / f"study.{kind}").read_bytes() for kind in ("md", "svg")])
    assert written[0] == written[1]
    assert b"| share | both |\n|---|---|\n| 0% | .1 |" in written[0][0]
    assert b"<svg" in written[0][1]


def test_a_run_that_was_made_otherwise_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "interactions.tsv").touch()
    laboratory = Laboratory(tmp_path, tmp_path / "work")
    folder = tmp_path / "work" / "runs" / "MF-warm" / "0"
    folder.mkdir(parents=True)
    kept = {"recipe": "mf", "settings": ["training.epochs=3"], "seed": 0, "evaluations": {"test": {}}}
    (folder / "measured.json").write_text(json.dumps(kept))
    assert laboratory.run("MF, warm", Experiment("random", 0, "mf", ("training.epochs=3",))) == kept
    with pytest.raises(SystemExit, match="was made with other settings"):
        laboratory.run("MF, warm", Experiment("random", 0, "mf"))
    with pytest.raises(SystemExit, match="was made with other settings"):
        laboratory.run("MF, warm", Experiment("random", 0, "mf", ("training.epochs=3",), {"test": {}, "hidden": {}}))
    # One that was interrupted has its configuration alone.
    (folder / "measured.json").unlink()
    dataset = f"dataset={laboratory.dataset_folder('random', 0)}"
    config = load_config(TrainConfig, "mf", [dataset, "seed=0", MEASURED, "training.epochs=3"])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    for other in (Experiment("random", 0, "mf"), Experiment("random", 1, "mf", ("training.epochs=3",))):
        laboratory.folder("MF, warm", other.seed).mkdir(exist_ok=True)
        (laboratory.folder("MF, warm", other.seed) / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        with pytest.raises(SystemExit, match=r"was made with other settings, see its config\.yaml"):
            laboratory.run("MF, warm", other)
    with pytest.raises(SystemExit, match="holds no MovieLens 1M"):
        Laboratory(tmp_path / "work", tmp_path)


def test_what_fails_ends_the_others() -> None:
    assert in_parallel(lambda number: number * 2, [1, 2, 3], 2) == [2, 4, 6]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda number: 1 / number, [1, 0], 1)
