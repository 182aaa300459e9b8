"""What the benchmark of evaluation compares is the same, and it notices what is not."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench import Found
from benchmarks.evaluation import ours, parts, recommend, report, task
from benchmarks.evaluation.agreement import differences
from benchmarks.evaluation.parts import CONTESTS, Workshop
from benchmarks.evaluation.peers import run_torchmetrics
from benchmarks.measure import Measured
from sibra_dist.recommending.manifest import TABLE

USERS, ITEMS = 300, 450


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task.write(tmp_path_factory.mktemp("tasks"), USERS, ITEMS)


def read(file: Path) -> task.Task:
    with np.load(file) as arrays:
        return task.Task(**arrays)


def outcome(program: ModuleType, what: str, file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a contender tells."""
    result = folder / "result.json"
    monkeypatch.setattr(sys, "argv", ["program", "--result", str(result), what, str(file), str(USERS)])
    program.main()
    told: dict[str, Any] = json.loads(result.read_text())
    return told


def kept(name: str, *runs: dict[str, Any]) -> dict[str, Any]:
    return {"setting": "six metrics", "name": name, "runs": list(runs)}


def test_a_task_is_drawn_once_and_its_tiles_hold_all_of_it(file: Path) -> None:
    before = file.stat().st_mtime_ns
    assert task.write(file.parent, USERS, ITEMS) == file
    assert file.stat().st_mtime_ns == before
    whole = read(file)
    pairs = [
        (rows.start + owner, item) for rows, owners, items in whole.tiles() for owner, item in zip(owners, items, strict=True)
    ]
    lengths = np.diff(whole.offsets)
    assert pairs == list(zip(np.repeat(np.arange(USERS), lengths), whole.relevant, strict=True))
    assert len(set(pairs)) == len(pairs)
    assert lengths.min() >= 1
    assert lengths.max() <= task.MOST_RELEVANT
    assert whole.first(7).offsets.tolist() == whole.offsets[:8].tolist()
    assert len(whole.first(7).relevant) == whole.offsets[7]


def test_ours_and_torchmetrics_agree_where_definitions_do(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = outcome(ours, "auc", file, tmp_path, monkeypatch)
    its = outcome(run_torchmetrics, "auc", file, tmp_path, monkeypatch)
    rows = differences({"contenders": [kept("ours", mine), kept("torchmetrics", its)]})
    apart = {row["metric"]: row["most"] for row in rows if row["name"] == "torchmetrics"}
    assert len(apart) == 7
    assert apart.pop("map") > 0.1
    assert 1e-5 < apart.pop("auc") < 0.01, "its sigmoid makes some scores equal"
    assert max(apart.values()) < 1e-5
    assert 0.01 < mine["metrics"]["ndcg@10"] < 0.99, "of a task in which nothing or all is found nothing can be learned"
    assert mine["users"] == its["users"] == USERS
    assert 0 < mine["scoring_seconds"] < mine["seconds"]


def test_the_best_items_are_the_best(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcome(ours, "lists", file, tmp_path, monkeypatch)["metrics"]["mean score"]
    whole = read(file)
    scores = torch.from_numpy(whole.users).double() @ torch.from_numpy(whole.items).double().T
    assert found == pytest.approx(scores.topk(task.LONGEST, dim=1).values.mean().item(), rel=1e-6)


def test_a_peer_that_finds_something_else_ends_the_benchmark() -> None:
    mine = kept("ours", {"users": 2, "metrics": {"ndcg@10": 0.5, "map@10": 0.5}, "prefixes": {"1": {"ndcg@10": 0.25}, "2": {}}})
    alike = kept("ranx", {"users": 1, "metrics": {"ndcg@10": 0.25}})
    mine["runs"][0]["prefixes"]["2"] = mine["runs"][0]["metrics"]
    assert [row["most"] for row in differences({"contenders": [mine, alike]})][-1] == 0
    other = kept("ranx", {"users": 2, "metrics": {"ndcg@10": 0.25, "map@10": 0.1}})
    with pytest.raises(SystemExit, match=r"ndcg of ranx differs from ours by 0\.5 of it"):
        differences({"contenders": [mine, other]})
    strange = kept("ranx", {"users": 2, "metrics": {"of its own": 1.0}})
    with pytest.raises(SystemExit, match="no metric in common"):
        differences({"contenders": [mine, strange]})


def test_every_contender_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "interpreter", lambda environment, folder: Path(environment.name))
    monkeypatch.setattr(Workshop, "task", lambda shop, users, items: f"{users}x{items}.npz")
    for make in CONTESTS.values():
        part = make(Workshop(tmp_path))
        keys = [contender.key for contender in part.contenders]
        assert len(set(keys)) == len(keys)
        assert {key for ratio in part.ratios for key in (ratio.above, ratio.below)} <= set(keys)
        for contender in part.contenders:
            assert "ours" in contender.name or contender.program[1].startswith("benchmarks.evaluation.peers.")


def test_recommendations_after_a_kill_are_compared_with_undisturbed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: str, log: Path) -> Measured:
        """Shards of which each holds the number of its first user."""
        if arguments[0] != "recommend":
            return Measured(1.0, 1.0, 1.0)
        folder = Path(arguments[-1]) / TABLE
        folder.mkdir(parents=True, exist_ok=True)
        listed = Path(arguments[arguments.index("--users") + 1]).read_text().splitlines()
        for number, first in enumerate(listed[:: recommend.USERS_PER_SHARD]):
            (folder / f"part-{number}").write_text(first)
        return Measured(2.0, 5.0, 1.0)

    monkeypatch.setattr(recommend, "sibra_dist", write)
    monkeypatch.setattr(recommend, "_killed", lambda asked, to, shards, log: shards)
    (tmp_path / "recommend").mkdir()
    users = 4 * recommend.USERS_PER_SHARD + 1
    found = recommend.measure(tmp_path, users)
    assert (found["shards"], found["kept"], found["same_files"]) == (5, 2, 4)
    assert found["users_per_second"] == 3 * recommend.USERS_PER_SHARD / 2
    (tmp_path / "recommend" / f"killed-{users}" / TABLE / "part-4").write_bytes(b"other")
    with pytest.raises(SystemExit, match="other files"):
        recommend.measure(tmp_path, users)
    assert recommend.measure(tmp_path, users, again=True)["same_files"] == 4


def test_the_report_shows_parts_that_are_complete() -> None:
    machine = {"date": "2026-01-01", "processor": "p", "cores": 2, "load": 0.5, "python": "3.11", "torch": "2"}
    run = {"users": 10, "metrics": {"ndcg@10": 1.0}, "users_per_second": 5.0, "users_per_processor_second": 6.0}
    run |= {"scoring_seconds": 0.5, "peak_rss_mebibytes": 100.0, "grown_mebibytes": 7.0}
    found: Found = {"contenders": [kept("ours", run), kept("ranx", run)], "machine": machine, "agreement": []}
    found["ratios"] = [{"what": "users/s", "ratio": 1.5, "by_processor": 1.25, "target": 1}]
    found["agreement"] = [{"setting": "six metrics", "name": "ranx", "metric": "map", "most": 0.25, "why": "a reason"}]
    shown = report.markdown({"metrics": found, "topk": {"contenders": []}})
    assert "| six metrics | ranx | 10 | 1 | 1 | 5 | 5 to 5 | 6 | 20 | 100 | 7 |" in shown
    assert "| users/s | 1.5 | 1.25 | at least 1 |" in shown
    assert "| six metrics | ranx | map | 0.2 | a reason |" in shown
    assert report.TITLES["topk"] not in shown
