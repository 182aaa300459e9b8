"""The benchmark of the preparation: its source, its pandas side against plain Python, and how it measures. No Spark in it."""

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.etl.__main__ import Size, check_agreement, read_measurements
from benchmarks.etl.measuring import Stopwatch, resident, run_measured, session_members
from benchmarks.etl.plain_pandas import prepare
from benchmarks.etl.report import crossing, growth
from benchmarks.etl.synthetic import FILES, TOP_ITEM_SHARE, generate, num_items, num_users
from benchmarks.etl.task import COUNTS

ROWS = 20_000
Record = tuple[str, str, str, str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("etl") / "source"
    generate(folder, ROWS, seed=3, chunk=700)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines_of(source: Path) -> list[list[str]]:
    paths = sorted(source.glob("interactions-*.tsv"))
    assert len(paths) == FILES
    return [line.split("\t") for path in paths for line in path.read_text().splitlines()[1:]]


def side_information(source: Path, name: str) -> dict[str, list[str]]:
    rows = [line.split("\t") for line in (source / name).read_text().splitlines()[1:]]
    return {identifier: values for identifier, *values in rows}


def reason_against(fields: list[str]) -> str | None:
    if len(fields) != 4:
        return "wrong number of fields"
    user, item, rating, time = fields
    faults = {
        "no user id": not user,
        "no item id": not item,
        "rating is not a finite number": not rating.isdecimal(),
        "time cannot be read": not time.isdecimal(),
    }
    return next((reason for reason, found in faults.items() if found), None)


def core_of(pairs: set[tuple[str, str]], k: int) -> set[tuple[str, str]]:
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        strong = {(user, item) for user, item in pairs if users[user] >= k and items[item] >= k}
        if strong == pairs:
            return pairs
        pairs = strong


def test_generator_gives_the_same_bytes_for_the_same_seed_only(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        generate(tmp_path / name, 3_000, seed=seed)
    assert content(tmp_path / "one") == content(tmp_path / "again")
    assert content(tmp_path / "one")["interactions-00.tsv"] != content(tmp_path / "other")["interactions-00.tsv"]


def test_generator_writes_the_rows_it_was_asked_for_and_tells_which_are_bad(source: Path, tmp_path: Path) -> None:
    told = generate(tmp_path / "source", ROWS, seed=3, chunk=700)
    assert content(tmp_path / "source") == content(source), "what is generated hangs on something else than its arguments"
    lines = lines_of(source)
    assert len(lines) == ROWS
    found = Counter(reason for reason in map(reason_against, lines) if reason)
    assert found == {reason: count for reason, count in told.items() if count}
    assert 0 < sum(found.values()) < ROWS / 200
    times = [int(fields[3]) for fields in lines if reason_against(fields) is None]
    assert times != sorted(times), "rows arrive late"
    assert min(times[ROWS // 2 :]) > max(times[: ROWS // 3]), "but in the order of time on the whole"
    assert {fields[2] for fields in lines if reason_against(fields) is None} == set("12345")


def test_generated_activity_and_popularity_are_heavy_tailed(tmp_path: Path) -> None:
    rows = 100_000
    generate(tmp_path / "source", rows)
    good = [fields for fields in lines_of(tmp_path / "source") if reason_against(fields) is None]
    users, items = Counter(fields[0] for fields in good), Counter(fields[1] for fields in good)
    assert len(users) <= num_users(rows)
    assert len(items) <= num_items(rows)
    (_, top), (_, second) = items.most_common(2)
    assert top == pytest.approx(rows * TOP_ITEM_SHARE, rel=0.2)
    assert top > 2 * second
    by_activity = sorted(users.values(), reverse=True)
    # Were all users alike, none would be beyond 150 rows, and a tenth of them would have a tenth of the rows.
    assert by_activity[0] > 10 * rows / num_users(rows)
    assert sum(by_activity[: len(by_activity) // 10]) > rows / 2
    assert sum(sorted(items.values())[-len(items) // 10 :]) > rows / 4
    duplicates = len(good) - len({(fields[0], fields[1]) for fields in good})
    assert 0 < duplicates < rows / 5


def test_some_side_information_is_missing(source: Path) -> None:
    for name, columns, count in (("users.tsv", 2, num_users(ROWS)), ("items.tsv", 3, num_items(ROWS))):
        rows = side_information(source, name)
        assert len(rows) == count
        gaps = [sum(values[column] == "" for values in rows.values()) for column in range(columns)]
        assert all(0 < gap < count / 5 for gap in gaps)


def read(folder: Path) -> dict[str, Any]:
    columns: dict[str, Any] = pq.read_table(folder).to_pydict()
    return columns


def test_pandas_side_keeps_and_divides_what_plain_python_does(source: Path, tmp_path: Path) -> None:
    to = tmp_path / "tables"
    counts = prepare(source, to, Stopwatch())

    lines = lines_of(source)
    good = [fields for fields in lines if reason_against(fields) is None]
    kept = core_of({(user, item) for user, item, rating, _ in good if int(rating) >= 3}, 5)
    users, items = sorted({user for user, _ in kept}), sorted({item for _, item in kept})
    assert 0 < len(users) < len({fields[0] for fields in good}), "the core leaves out some users, not all"
    held_out = sum(ceil(count * Fraction(1, 10)) for count in Counter(user for user, _ in kept).values())
    assert counts == {
        "read": len(lines),
        "rejected": len(lines) - len(good),
        "kept": len(kept),
        "users": len(users),
        "items": len(items),
        "train": len(kept) - 2 * held_out,
        "validation": held_out,
        "test": held_out,
    }
    assert set(counts) == set(COUNTS)

    assert read(to / "users")["id"] == users
    assert read(to / "items")["id"] == items
    found: list[tuple[str, str]] = []
    for table in ("histories/users", "held_out/validation", "held_out/test"):
        columns = read(to / table)
        assert all(others is None or others == sorted(set(others)) for others in columns["items"])
        found += [(users[u], items[i]) for u, others in zip(*columns.values(), strict=True) for i in others or ()]
    assert len(found) == len(kept), "no pair is in two splits"
    assert set(found) == kept
    by_user, by_item = read(to / "histories/users"), read(to / "histories/items")
    assert by_item["index"] == list(range(len(items)))
    transposed = {(user, item) for item, others in enumerate(by_item["users"]) for user in others or ()}
    assert transposed == {(user, item) for user, others in enumerate(by_user["items"]) for item in others or ()}


def test_pandas_side_keeps_every_rejected_record_with_its_reason(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "tables", Stopwatch())
    rejected = read(tmp_path / "tables/rejected")
    lines = lines_of(source)
    mentioned = [{fields[place] for fields in lines if reason_against(fields) is None} for place in (0, 1)]
    unknown = {
        (side, "unknown id"): len(set(side_information(source, f"{side}.tsv")) - ids)
        for side, ids in zip(("users", "items"), mentioned, strict=True)
    }
    bad = Counter(("interactions", reason) for reason in map(reason_against, lines) if reason)
    expected = {key: count for key, count in {**bad, **unknown}.items() if count}
    assert Counter(zip(rejected["table"], rejected["reason"], strict=True)) == expected


def test_pandas_side_encodes_features_as_plain_python_does(source: Path, tmp_path: Path) -> None:
    to = tmp_path / "tables"
    prepare(source, to, Stopwatch())
    raw, table = side_information(source, "items.tsv"), read(to / "items")
    kept = [raw[identifier] for identifier in table["id"]]
    categories = sorted({category for category, _, _ in kept if category})
    tags = sorted({tag for _, joined, _ in kept if joined for tag in joined.split("|")})
    years = [int(year) for _, _, year in kept if year]
    mean = sum(years) / len(years)
    deviation = (sum((year - mean) ** 2 for year in years) / len(years)) ** 0.5
    assert table["category"] == [categories.index(category) if category else None for category, _, _ in kept]
    coded_tags = [sorted({tags.index(tag) for tag in joined.split("|")}) if joined else None for _, joined, _ in kept]
    assert table["tags"] == coded_tags
    for coded, (_, _, year) in zip(table["year"], kept, strict=True):
        assert coded == ([pytest.approx((int(year) - mean) / deviation, abs=1e-5)] if year else None)
    assert set(table["split"]) == {"train"}
    schema = pq.read_schema(to / "items/part-00000.parquet")
    assert [str(kind) for kind in schema.types[:4]] == ["int32", "string", "string", "int32"]
    assert schema.types[4:] == [pa.list_(pa.int32()), pa.list_(pa.float32())]


GRANDPARENT = """
import subprocess, sys
child = "import sys; block = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"
subprocess.run([sys.executable, "-c", child])
"""


def test_memory_of_a_process_that_a_process_started_counts() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GRANDPARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        members = session_members(process.pid)
        assert process.pid in members
        assert len(members) == 2
        assert resident(process.pid) < 64 << 20 <= sum(map(resident, members))
        process.stdin.close()
    assert session_members(process.pid) == []


GROWS_UNTIL_SEEN = """
import sys
from pathlib import Path
from benchmarks.etl.measuring import write_result
block = bytearray(b"x") * (64 << 20)
while not Path(sys.argv[1]).exists():
    pass
write_result(Path(sys.argv[2]), {"stages": {"work": 0.0}})
"""


def test_a_module_is_run_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grows.py").write_text(GROWS_UNTIL_SEEN)
    (tmp_path / "fails.py").write_text("raise ValueError('as it must')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    seen, log, result = tmp_path / "seen", tmp_path / "log.txt", tmp_path / "result.json"

    def look(pid: int) -> int:
        size = resident(pid)
        if size >= 64 << 20:
            seen.touch()
        return size

    monkeypatch.setattr("benchmarks.etl.measuring.resident", look)
    told = run_measured("grows", seen, result=result, log=log)
    assert told["peak_rss"] >= 64
    assert told["processes"] == 1
    assert told["stages"] == {"start": told["seconds"], "work": 0.0}, "what no stage accounts for is the start"
    assert not result.exists()
    with pytest.raises(SystemExit, match=r"fails .* ended with 1; see .*log\.txt"):
        run_measured("fails", result=result, log=log)
    assert "as it must" in log.read_text()


def line(rows: int, what: str, **figures: Any) -> dict[str, Any]:
    return {"rows": rows, "what": what, **figures}


def test_what_has_been_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(1000, what) for what in ("pandas", "spark", "open, empty cache", "open, warm cache")]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    measurements = read_measurements(tmp_path / "results.jsonl")
    ran: list[str] = []

    def pretend(module: str, *arguments: object, result: Path, log: Path) -> dict[str, Any]:
        ran.append(module)
        raise SystemExit("interrupted")

    monkeypatch.setattr("benchmarks.etl.__main__.run_measured", pretend)
    Size(1000, tmp_path, measurements).measure(with_pandas=True)
    assert ran == []
    del measurements[1000, "open, warm cache"]  # its dataset is gone, so the source is needed again
    with pytest.raises(SystemExit, match="interrupted"):
        Size(1000, tmp_path, measurements).measure(with_pandas=True)
    assert ran == ["benchmarks.etl.synthetic"]


def test_sides_that_disagree_are_told() -> None:
    counts = dict.fromkeys(COUNTS, 5)
    same = {(10, what): line(10, what, counts=counts) for what in ("pandas", "spark")}
    check_agreement(same, 10)
    same[10, "spark"] = line(10, "spark", counts=counts | {"kept": 6})
    with pytest.raises(SystemExit, match=r"at 10 rows .*: kept: Spark 6, pandas 5$"):
        check_agreement(same, 10)


def test_crossover_lies_where_the_lines_meet() -> None:
    pandas_ahead = [(1.0, 1.0, 5.0), (2.0, 2.0, 5.5)]
    assert crossing([(1.0, 2.0, 1.0), (2.0, 4.0, 2.0)]) == 0, "Spark is ahead from the start"
    assert crossing([*pandas_ahead, (10.0, 30.0, 10.0)]) == pytest.approx(2 + 8 * 3.5 / 23.5), "between measurements"
    assert crossing(pandas_ahead) == pytest.approx(9.0), "beyond the last: 1 + (n - 1) = 5 + (n - 1) / 2"
    assert crossing([(1.0, 1.0, 5.0), (2.0, 2.0, 6.0)]) is None, "parallel"


def test_growth_of_the_cost_of_a_row_is_held_to_the_limit() -> None:
    seconds = {1_000_000: 20.0, 10_000_000: 100.0, 50_000_000: 600.0}
    figures = {(rows, "spark"): line(rows, "spark", seconds=taken) for rows, taken in seconds.items()}
    assert list(growth(figures)) == [
        "Spark, 1,000,000 to 10,000,000 rows: cost per row -50%",
        "Spark, 10,000,000 to 50,000,000 rows: cost per row +20%, within the 25% allowed",
    ]
    figures[50_000_000, "spark"]["seconds"] = 700.0
    assert list(growth(figures))[1].endswith("cost per row +40%, MORE THAN the 25% allowed")
