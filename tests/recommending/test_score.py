"""Recommendations of other systems: scored as runs are, against plain Python, in any form and order; and bad files."""

import csv
import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from sibra_dist.cli import main
from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import CheckpointError, ConfigError, SourceError
from sibra_dist.recommending import division, records
from sibra_dist.recommending.score import Scored, score
from sibra_dist.training.run_folder import RunFolder
from tests.planted import write_planted

Call = Callable[[str], tuple[int, str, str]]
Row = tuple[str, str, float]
METRICS = ("ndcg@3", "recall@3", "mrr@5", "coverage@5", "pop_rsp@3")
FOLDER = Path("evaluation") / "test"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two datasets, of 60 users and 80 items."""
    folder = tmp_path_factory.mktemp("score")
    write_planted(folder / "dataset", protocol="random")
    write_planted(folder / "cold", protocol="cold_item")
    return folder


@pytest.fixture
def call(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(work)

    def run(command: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(command.split())
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def drawn(seed: int = 0) -> list[Row]:
    """Records in no order, with many ties; unknown ones, seen ones and duplicates among them; users from 50 on have none."""
    generator = random.Random(seed)
    found = [
        (f"u{generator.randrange(52) if user % 9 else 999:04}", f"i{generator.randrange(80) if user % 7 else 999:04}")
        for user in range(2000)
    ]
    return [(user, item, float(generator.randrange(4))) for user, item in found if user < "u0050" or user == "u0999"]


def write(path: Path, rows: list[Row], column: str = "score") -> Path:
    table = pa.table(dict(zip(("user_id", "item_id", column), map(list, zip(*rows, strict=True)), strict=True)))
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=300)
    else:
        pa_csv.write_csv(table, path, pa_csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    return path


def held(dataset: Path, table: str, column: str = "items") -> dict[str, set[str]]:
    paths = sorted((dataset / table).glob("*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return {f"u{row['index']:04}": {f"i{item:04}" for item in row[column] or ()} for row in rows}


def scored(source: Path | str, dataset: Path, to: Path, metrics: tuple[str, ...] = METRICS) -> dict[str, Any]:
    score(Scored(str(source), "test", metrics), open_dataset(dataset), RunFolder(to))
    result: dict[str, Any] = json.loads((to / FOLDER / "metrics.json").read_text())
    return result


def test_a_list_is_scored_as_plain_python_does_it(work: Path, tmp_path: Path) -> None:
    rows = drawn()
    dataset = work / "dataset"
    found = scored(write(tmp_path / "peer.csv", rows), dataset, tmp_path / "peer")
    seen, validation, relevant = (held(dataset, name) for name in ("histories/users", "held_out/validation", "held_out/test"))
    reasons: Counter[str] = Counter()
    best: dict[str, dict[str, float]] = defaultdict(dict)
    for user, item, value in rows:
        if user == "u0999":
            reasons["unknown user id"] += 1
        elif item == "i0999":
            reasons["unknown item id"] += 1
        else:
            reasons["duplicate"] += item in best[user]
            best[user][item] = max(value, best[user].get(item, -math.inf))
    ndcgs, recalls, used, empty, short = [], [], 0, 0, 0
    for user, wanted in relevant.items():
        left = {item: value for item, value in best[user].items() if item not in seen[user] | validation[user]}
        reasons["masked for the user"] += len(best[user]) - len(left)
        ranked = sorted(left, key=lambda item: (-left[item], item))
        gains = [1 / math.log2(place + 2) for place, item in enumerate(ranked[:3]) if item in wanted]
        ndcgs.append(sum(gains) / sum(1 / math.log2(place + 2) for place in range(min(3, len(wanted)))))
        recalls.append(len(gains) / len(wanted))
        used, empty, short = used + len(left), empty + (not left), short + (0 < len(left) < 5)
    assert found["metrics"]["test/ndcg@3"] == pytest.approx(sum(ndcgs) / len(ndcgs), abs=1e-9) != 0
    assert found["metrics"]["test/recall@3"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-9)
    assert list(found["metrics"]) == [f"test/{name}" for name in METRICS]
    assert found["recommendations"]["rejected"] == dict(sorted(reasons.items()))
    assert all(reasons.values())
    assert (found["recommendations"]["records"], found["recommendations"]["used"]) == (len(rows), used)
    assert {name: found["counts"][name] for name in ("users", "users_without_recommendations", "users_with_short_lists")} == {
        "users": 60,
        "users_without_recommendations": empty,
        "users_with_short_lists": short,
    }
    assert empty >= 10
    assert len(pq.read_table(tmp_path / "peer" / FOLDER / "users.parquet")) == 60
    told = list(csv.DictReader(io.StringIO((tmp_path / "peer" / FOLDER / "rejected.csv").read_text())))
    assert Counter(line["reason"] for line in told) == reasons
    assert {line["file"] for line in told} == {str(tmp_path / "peer.csv")}
    sent = Counter(f"{user},{item},{value:g}" for user, item, value in rows)
    assert not Counter(line["record"] for line in told) - sent


def test_form_order_and_division_do_not_matter(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn()
    expected = scored(write(tmp_path / "a.csv", rows), work / "dataset", tmp_path / "a")
    users = (tmp_path / "a" / FOLDER / "users.parquet").read_bytes()
    monkeypatch.setattr(records, "BATCH_ROWS", 70)
    monkeypatch.setattr(records, "BLOCK_BYTES", 500)
    monkeypatch.setattr(division, "USERS_PER_PART", 7)
    random.Random(1).shuffle(rows)
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "part-0.parquet", rows[:800])
    write(tmp_path / "shards" / "part-1.csv", rows[800:])
    (tmp_path / "shards" / "_SUCCESS").touch()
    (tmp_path / "shards" / "_temporary").mkdir()
    write(tmp_path / "shards" / "_temporary" / "part-1.csv", rows[:5])
    for source in (write(tmp_path / "b.tsv", rows), write(tmp_path / "b.parquet", rows), tmp_path / "shards"):
        found = scored(source, work / "dataset", tmp_path / "b")
        assert {**found, "recommendations": None} == {**expected, "recommendations": None}
        assert {**found["recommendations"], "source": ""} == {**expected["recommendations"], "source": ""}
        assert (tmp_path / "b" / FOLDER / "users.parquet").read_bytes() == users


def test_ranks_give_the_order_and_need_not_be_without_gaps(work: Path, tmp_path: Path) -> None:
    rows = [(f"u{user:04}", f"i{item:04}", float(item * 7 % 80)) for user in range(60) for item in range(80)]
    ranks = [(user, item, 3 * (80 - value)) for user, item, value in rows]
    by_score = scored(write(tmp_path / "scores.csv", rows), work / "dataset", tmp_path / "scores")
    by_rank = scored(write(tmp_path / "ranks.csv", ranks, "rank"), work / "dataset", tmp_path / "ranks")
    assert by_rank["metrics"] == by_score["metrics"]


def test_with_cold_items_others_are_no_candidates(work: Path, tmp_path: Path) -> None:
    rows = [(f"u{user:04}", f"i{item:04}", float(item)) for user in range(60) for item in range(80)]
    found = scored(write(tmp_path / "peer.csv", rows), work / "cold", tmp_path / "peer")
    holders = len(held(work / "cold", "held_out/test"))
    assert found["counts"]["users"] == holders < 60
    assert found["recommendations"]["rejected"] == {"no candidate of the split": holders * 72}
    assert found["recommendations"]["used"] == holders * 8


def test_a_file_without_faults_leaves_no_rejections_and_replaces_those_of_a_former(work: Path, tmp_path: Path) -> None:
    scored(write(tmp_path / "peer.csv", drawn()), work / "dataset", tmp_path / "peer")
    assert (tmp_path / "peer" / FOLDER / "rejected.csv").exists()
    held_out = held(work / "dataset", "held_out/test")
    rows = [(user, item, 1.0) for user, items in held_out.items() for item in items]
    found = scored(write(tmp_path / "peer.csv", rows), work / "dataset", tmp_path / "peer")
    assert found["metrics"]["test/recall@3"] == found["metrics"]["test/ndcg@3"] == 1
    assert sorted(path.name for path in (tmp_path / "peer" / FOLDER).iterdir()) == ["metrics.json", "users.parquet"]


@pytest.mark.parametrize("model", ["pop", "random"])
def test_what_a_run_recommends_scores_as_the_run_does(call: Call, work: Path, model: str) -> None:
    assert call(f"train {model} --to {model} dataset=dataset")[0] == 0
    assert call(f"evaluate {model}")[0] == 0
    assert call(f"recommend {model} --to lists-{model} --exclude none -k 80")[0] == 0
    code, out, err = call(f"evaluate --recommendations lists-{model} --dataset dataset --to peer-{model}")
    assert (code, err) == (0, "")
    assert "masked for the user: see" in out
    mine, theirs = (json.loads((work / name / FOLDER / "metrics.json").read_text()) for name in (model, f"peer-{model}"))
    for part in ("metrics", "groups", "item_groups", "users", "dataset", "split", "hidden"):
        assert theirs[part] == mine[part]
    users = [(work / name / FOLDER / "users.parquet").read_bytes() for name in (model, f"peer-{model}")]
    assert users[0] == users[1]
    code, out, err = call(f"compare {model} peer-{model} --format csv")
    assert (code, err) == (0, "")
    assert [line["difference"] for line in csv.DictReader(io.StringIO(out))] == ["", "0.0"]
    code, out, err = call(f"report {model} peer-{model}")
    assert (code, err) == (0, "")
    assert f"peer-{model}" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id,item_id\nu0001,i0001\n", "has no column rank or score"),
        ("user_id,item,score\nu0001,i0001,1\n", "has no column item_id; did you mean item"),
        ("user_id,item_id,score\nu0001,i0001,\n", "has no number as score of item 'i0001' for user 'u0001'"),
        ("user_id,item_id,score\nu0001,i0001,nan\n", "has no number as score of item 'i0001' for user 'u0001'"),
        ("user_id,item_id,score\nu0001,i0001,best\n", "cannot be read: .*best"),
        ("user_id,item_id,score\nu0001,i0001\n", "cannot be read: .*Expected 3 columns, got 2"),
        ("user_id,item_id,rank\nu0001,i0001,2\nu0001,i0002,2\n", "gives two items rank 2 for user 'u0001'"),
        ("user_id,item_id,score\n1,1,1\n1,2,1\n", "none of the 2 records .* is of a user and an item"),
        ("user_id,item_id,score\n", "none of the 0 records"),
        ("", "has no column rank or score"),
        ("user_id,item_id,score,score\nu0001,i0001,1,2\n", "has 2 columns score"),
    ],
)
def test_a_bad_file_is_refused_and_leaves_nothing(work: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "peer.csv").write_text(content)
    with pytest.raises(SourceError, match=message):
        scored(tmp_path / "peer.csv", work / "dataset", tmp_path / "peer")
    assert not [path for path in (tmp_path / "peer").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "message"),
    [("peer.txt", "is no table"), ("peer.parquet", "cannot be read"), ("no", "no such table")],
)
def test_what_is_no_table_is_refused(work: Path, tmp_path: Path, name: str, message: str) -> None:
    if name != "no":
        (tmp_path / name).write_text("user_id,item_id,score\n")
    with pytest.raises(SourceError, match=message):
        scored(tmp_path / name, work / "dataset", tmp_path / "peer")


def test_a_column_that_is_there_twice_is_refused_in_parquet_too(work: Path, tmp_path: Path) -> None:
    columns = [pa.array([value]) for value in ("u0001", "i0001", 1.0, 2.0)]
    pq.write_table(pa.table(columns, names=["user_id", "item_id", "score", "score"]), tmp_path / "peer.parquet")
    with pytest.raises(SourceError, match="has 2 columns score; leave one of them"):
        scored(tmp_path / "peer.parquet", work / "dataset", tmp_path / "peer")


def test_recommendations_that_are_not_complete_are_refused(work: Path, tmp_path: Path, call: Call) -> None:
    assert call("train pop --to pop-1 dataset=dataset")[0] == 0
    assert call("recommend pop-1 --to lists-1")[0] == 0
    manifest = work / "lists-1" / "recommendations.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False, "shards": []}))
    with pytest.raises(SourceError, match="is not complete yet"):
        scored(work / "lists-1", work / "dataset", tmp_path / "peer")
    with pytest.raises(CheckpointError, match="holds a run with results of its own"):
        scored(work / "lists-1", work / "dataset", work / "pop-1")


@pytest.mark.parametrize("to", ["shards", "shards/deeper"])
def test_a_result_among_the_recommendations_is_refused(work: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "part-0.csv", drawn())
    with pytest.raises(ConfigError, match=r"the result would be one of the tables in .*shards; give a folder beside it"):
        scored(tmp_path / "shards", work / "dataset", tmp_path / to)
    scored(tmp_path / "shards", work / "dataset", tmp_path / "shards-scored")


def test_auc_is_refused_as_a_file_does_not_hold_all_candidates(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--metric auc: it compares all candidates"):
        scored("peer.csv", work / "dataset", tmp_path / "peer", ("ndcg@5", "auc"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give a RUN, or else --recommendations FILE"),
        ("pop --recommendations peer.csv --dataset dataset", "give a RUN, or else --recommendations FILE"),
        ("--recommendations peer.csv", "give it with --dataset DATASET"),
        ("--recommendations peer.csv --dataset dataset --hide items.tags", "--hide and --workers are for a RUN"),
        ("pop --metric ndcg@5", "leave out --metric and --to"),
        ("--recommendations peer.csv --dataset dataset --metric ndgc@5", "did you mean ndcg?"),
        ("--recommendations peer.csv --dataset dataset", "peer.csv cannot be read"),
    ],
)
def test_a_bad_command_is_told_in_one_line(call: Call, options: str, message: str) -> None:
    code, out, err = call(f"evaluate {options}")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
