"""`sibra-dist compare` as its users call it, on runs that were evaluated, and on those that cannot be compared."""

import csv
import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sibra_dist.cli import main
from sibra_dist.comparison.runs import compare_runs
from sibra_dist.comparison.tables import written
from sibra_dist.errors import CheckpointError, ConfigError
from tests.planted import write_planted

Call = Callable[[str], tuple[int, str, str]]
RESULT = "evaluation/test/metrics.json"
USERS = "evaluation/test/users.parquet"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of one dataset, `pop` and `random`, and one of another, `other`."""
    folder = tmp_path_factory.mktemp("compare") / "work"
    folder.mkdir()
    write_planted(folder / "dataset", protocol="random")
    write_planted(folder / "another", protocol="random", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run, model, dataset in (("pop", "pop", "dataset"), ("random", "random", "dataset"), ("other", "pop", "another")):
            for command in (f"train {model} --to {run} dataset={dataset}", f"evaluate {run}"):
                with pytest.raises(SystemExit, match=r"^0$"):
                    main(command.split())
    return folder


@pytest.fixture
def runs(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be altered; commands start in it."""
    shutil.copytree(evaluated, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(command: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(command.split())
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def alter_result(run: Path, **changes: Any) -> None:
    result = json.loads((run / RESULT).read_text())
    (run / RESULT).write_text(json.dumps({**result, **changes}))


def alter_users(run: Path, table: pa.Table) -> None:
    """Another table of users, with which the result agrees."""
    pq.write_table(table, run / USERS)
    sha256 = hashlib.sha256((run / USERS).read_bytes()).hexdigest()
    alter_result(run, users={"file": "users.parquet", "rows": len(table), "sha256": sha256})


def figures(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_figure_in_csv(runs: Path, call: Call) -> None:
    code, out, err = call("compare pop random --metric ndcg@10 --metric recall@5 --format csv")
    assert (code, err) == (0, "")
    lines = figures(out)
    assert [(line["metric"], line["run"]) for line in lines] == [
        (metric, run) for metric in ("ndcg@10", "recall@5") for run in ("pop", "random")
    ]
    tables = [pq.read_table(runs / run / USERS).to_pydict() for run in ("pop", "random")]
    assert tables[0]["user_id"] == tables[1]["user_id"]
    for metric, first, second in zip(("ndcg@10", "recall@5"), lines[::2], lines[1::2], strict=True):
        before, after = (table[metric] for table in tables)
        found = [new - old for old, new in zip(before, after, strict=True)]
        mean = sum(found) / len(found)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / (len(found) - 1))
        assert float(first["mean"]) == pytest.approx(sum(before) / len(before))
        assert float(second["mean"]) == pytest.approx(sum(after) / len(after))
        assert {first[name] for name in first if name not in ("metric", "run", "users", "mean")} == {""}
        assert int(second["users"]) == len(found)
        assert float(second["difference"]) == pytest.approx(mean, abs=1e-10)
        assert float(second["effect_size"]) == pytest.approx(mean / deviation, rel=1e-8)
        assert float(second["t"]) == pytest.approx(mean / deviation * math.sqrt(len(found)), rel=1e-8)
        assert float(second["interval_low"]) < mean < float(second["interval_high"])
        assert second["t_p"] == second["t_p_bonferroni"] == second["t_p_holm"]  # one run is compared
        assert 0 < float(second["wilcoxon_p"]) <= 1


def test_several_runs_are_corrected_for(runs: Path) -> None:
    shutil.copytree(runs / "random", runs / "again")
    first, second, third = compare_runs(["pop", "random", "again"], "test", ["mrr@10"], 100, 0)
    assert first.against is None
    assert second.against is not None
    assert third.against == second.against
    for test in (second.against.t_test, second.against.wilcoxon):
        assert test.bonferroni == test.holm == min(1, 2 * test.outcome.p_value)


def test_the_same_each_time_and_another_interval_for_another_seed(runs: Path, call: Call) -> None:
    command = "compare pop random --format csv --resamples 200"
    assert call(command) == call(command)
    one, other = (figures(call(f"{command} --seed {seed}")[1])[1] for seed in (0, 1))
    changed = {name for name in one if one[name] != other[name]}
    assert changed
    assert changed <= {"interval_low", "interval_high"}


def test_as_text(runs: Path, call: Call) -> None:
    code, out, _ = call("compare pop random --metric ndcg@10 --metric ndcg@20")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["ndcg@10", "of", "60", "users"]
    assert lines[1].split()[:2] == ["run", "mean"]
    assert [line.split()[0] for line in lines[2:4]] == ["pop", "random"]
    assert len(lines[3].split()) == len("run mean difference from to d t bonferroni holm w bonferroni holm".split())
    assert lines[5].split()[0] == "ndcg@20"
    assert "Differences to pop, user by user" in out
    assert max(map(len, lines)) <= 120


def test_as_markdown(runs: Path, call: Call) -> None:
    shutil.copytree(runs / "pop", runs / "a|b")
    code, out, _ = call("compare pop a|b --format markdown")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[1] == "| --- | --- |" + " ---: |" * 12
    assert lines[3].startswith("| ndcg@10 | a\\|b | 60 | ")
    assert lines[3].endswith("| +0.0000 | +0.0000 | +0.0000 | +0.000 | 1 | 1 | 1 | 1 | 1 | 1 |")


def test_as_latex(runs: Path, call: Call) -> None:
    shutil.copytree(runs / "random", runs / "a_b&c")
    code, out, _ = call("compare pop a_b&c --format latex")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == r"\begin{tabular}{ll" + "r" * 12 + "}"
    assert lines[-1] == r"\end{tabular}"
    assert lines[2].startswith(r"metric & run & users & mean & difference & 95 \% from & to & d & ")
    assert lines[5].startswith(r"ndcg@10 & a\_b\&c & 60 & ")
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 3
    assert all(line.replace(r"\&", "").count("&") == 13 for line in rows)


def test_users_are_joined_by_id(runs: Path) -> None:
    expected = compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)
    table = pq.read_table(runs / "random" / USERS)
    alter_users(runs / "random", table.take(list(reversed(range(len(table))))))
    assert compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0) == expected


@pytest.mark.parametrize("changed", ["fewer", "another", "twice"])
def test_other_users_are_refused(runs: Path, changed: str) -> None:
    table = pq.read_table(runs / "random" / USERS)
    ids = table["user_id"].to_pylist()
    if changed == "fewer":
        table = table.slice(1)
    else:
        ids[0] = "somebody else" if changed == "another" else ids[1]
        table = table.set_column(0, "user_id", pa.array(ids))
    alter_users(runs / "random", table)
    with pytest.raises(CheckpointError, match="random was evaluated on other users than the first run"):
        compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)


def test_runs_of_different_datasets_are_refused(runs: Path, call: Call) -> None:
    code, out, err = call("compare pop random other")
    digests = [json.loads((runs / run / RESULT).read_text())["dataset"][:12] for run in ("other", "pop")]
    assert (code, out) == (2, "")
    assert err == (
        "error: other and pop were evaluated on what is not the same, so their figures cannot be compared: "
        f"dataset {digests[0]} and {digests[1]}\n"
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"split": "validation"}, "split validation and test$"),
        ({"hidden": ["items.tags=0.5"]}, "hidden items.tags=0.5 and nothing$"),
        ({"counts": {"candidates": 8}}, "candidates 8 and 80$"),
        ({"split": "validation", "counts": {"candidates": 8}}, "split validation and test; candidates 8 and 80$"),
    ],
    ids=["split", "hidden", "candidates", "two of them"],
)
def test_what_was_not_evaluated_alike_is_refused(runs: Path, changes: dict[str, Any], told: str) -> None:
    alter_result(runs / "random", **changes)
    with pytest.raises(CheckpointError, match=told):
        compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)


def test_all_items_where_the_split_ranks_them_anyway_are_the_same(runs: Path) -> None:
    before = compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)
    alter_result(runs / "random", candidates="all")
    assert compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0) == before


def test_results_without_their_users_are_told(runs: Path) -> None:
    content = (runs / "random" / USERS).read_bytes()
    (runs / "random" / USERS).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"users.parquet is not the file .*: run `sibra-dist evaluate random`$"):
        compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)
    alter_result(runs / "random", users=None)
    with pytest.raises(CheckpointError, match=r"holds no values of single users, .*: run `sibra-dist evaluate random`$"):
        compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"dataset hidden metrics"'])
@pytest.mark.parametrize("command", ["compare pop random", "report pop random"])
def test_a_result_that_is_none_is_told(runs: Path, call: Call, command: str, content: str) -> None:
    (runs / "random" / RESULT).write_text(content)
    told = "error: random has no evaluation of the test split: run `sibra-dist evaluate random`\n"
    assert call(command) == (2, "", told)


def test_a_metric_that_one_run_lacks_is_told(runs: Path) -> None:
    metrics = json.loads((runs / "random" / RESULT).read_text())["metrics"]
    alter_result(runs / "random", metrics={name: value for name, value in metrics.items() if name != "test/mrr@20"})
    with pytest.raises(ConfigError, match=r"^--metric mrr@20: .*; did you mean mrr@10\?$"):
        compare_runs(["pop", "random"], "test", ["mrr@20"], 50, 0)


def test_one_user_is_too_few(runs: Path) -> None:
    for run in ("pop", "random"):
        alter_users(runs / run, pq.read_table(runs / run / USERS).slice(0, 1))
    with pytest.raises(CheckpointError, match="pop was evaluated on 1 users; two or more are needed for a test"):
        compare_runs(["pop", "random"], "test", ["ndcg@10"], 50, 0)


def test_every_metric_once_however_often_it_is_asked_for(runs: Path) -> None:
    lines = compare_runs(["pop", "random"], "test", ["mrr@5", "mrr@5"], 50, 0)
    assert len(lines) == 2
    assert len(figures(str(written(lines, "csv")))) == 2
